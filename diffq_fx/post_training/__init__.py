"""Compression without a training loop: what weights are multiplied with, and rounding that compensates its own error."""
