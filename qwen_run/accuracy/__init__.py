"""How close an engine is to Hugging Face: both sides, the numbers, the verdict."""
