"""To and from other tools: Hugging Face folders, their weights and tokenizers."""
