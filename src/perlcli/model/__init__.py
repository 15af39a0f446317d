"""The frozen base, its tokenizer, and the adapters on it."""
