"""Training: the size of the model, the pressure on it, and the optimizer."""
