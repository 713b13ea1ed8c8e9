"""The model and its loss as pure JAX: nothing of files or runs."""
