"""Text and conversations to token ids, and back while they come."""
