"""Generation from a trained model: caches, sampling, quantised weights."""
