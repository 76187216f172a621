"""Training: what happens around an optimizer's step, what finishes a training, and the drivers of methods that have their own loop."""
