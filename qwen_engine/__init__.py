"""What builder and runtime agree on: the manifest, the graph's inputs and outputs, the error tree."""

__version__ = "0.1.0"
