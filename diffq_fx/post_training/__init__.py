"""Compression of a float model by unlabelled batches alone: minutes, no labels and no training loop."""
