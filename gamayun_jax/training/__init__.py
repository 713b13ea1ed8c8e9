"""What a training run is made of: the step, its state, its folder, its faults."""
