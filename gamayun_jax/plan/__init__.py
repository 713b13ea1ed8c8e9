"""What a run would take of a TPU, found by compiling it ahead of time."""
