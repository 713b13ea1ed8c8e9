"""Training on machines of a cloud: created, started, watched, deleted."""
