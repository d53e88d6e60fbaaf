"""The chat page: files of its own, which a browser gets as they are, and the responses that carry them."""
