"""The trained model: the built-in one or one of Hugging Face, with or without adapters."""
