"""Train multilingual language models from scratch in JAX, in curriculum stages."""

__version__ = "0.1.0"
