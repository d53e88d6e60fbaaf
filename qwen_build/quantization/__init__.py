"""Grids, and the schemes that store a weight on them."""
