"""One file a program: options in, one call."""
