"""What training with noise does at every step, at the price of memory bandwidth: noise, steps of the bits, rounding."""

from diffq_fx.kernels.bits import bits_of_logits, step_of_logits
from diffq_fx.kernels.memory import release
from diffq_fx.kernels.noise import add_noise

__all__ = ["add_noise", "bits_of_logits", "release", "step_of_logits"]
