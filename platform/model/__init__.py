"""A Hugging Face model on packed tokens, its heads and its text."""
