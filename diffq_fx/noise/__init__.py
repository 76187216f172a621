"""Pseudo quantization noise at the price of memory bandwidth: draw, add, and in the backward one grouped reduction."""

from diffq_fx.noise.memory import release
from diffq_fx.noise.operator import add_noise
from diffq_fx.noise.steps import bits_of_logits, step_of_logits

__all__ = ["add_noise", "bits_of_logits", "release", "step_of_logits"]
