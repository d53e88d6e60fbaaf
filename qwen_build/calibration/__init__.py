"""Rounding that knows what the linears read."""
