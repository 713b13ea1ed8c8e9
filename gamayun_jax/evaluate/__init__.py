"""Held-out text, tasks and alignment, and the statistics of their comparison."""
