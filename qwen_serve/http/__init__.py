"""Connections: routes, who may ask, the process."""
