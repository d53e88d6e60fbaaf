"""The builder: a Hugging Face checkpoint in, an engine directory out."""
