"""Pages and figures from the records of runs: reads JSON, never JAX."""
