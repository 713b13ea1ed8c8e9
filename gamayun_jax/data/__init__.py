"""From documents to batches: exact mixtures, corpora, tokenizers. NumPy; only
the loader sees JAX."""
