"""The ways in which programs store quantised weights: a module each, and one table of them."""
