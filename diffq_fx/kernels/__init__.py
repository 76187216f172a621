"""What training with noise does at every step, at the price of memory bandwidth: noise, ranges, steps of the bits, rounding."""

from diffq_fx.kernels.bits import bits_of_logits, step_of_logits
from diffq_fx.kernels.memory import release
from diffq_fx.kernels.noise import add_noise
from diffq_fx.kernels.ranges import least_error_range, normal_range
from diffq_fx.kernels.rounding import learned_factor, round_in_range

__all__ = [
    "add_noise",
    "bits_of_logits",
    "learned_factor",
    "least_error_range",
    "normal_range",
    "release",
    "round_in_range",
    "step_of_logits",
]
