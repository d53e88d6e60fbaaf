"""The runtime: engine directories, requests and text in, tokens and text out."""
