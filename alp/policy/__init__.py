"""The model that is trained: built in, or of Hugging Face, with or without adapters."""
