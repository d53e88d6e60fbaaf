"""What a model wrote, told apart: thinking, text, and calls of tools."""
