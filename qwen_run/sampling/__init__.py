"""From logits to the next token: pure functions of arrays."""
