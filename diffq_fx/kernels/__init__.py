"""What training with noise does at every step, at the price of memory bandwidth: noise, ranges, steps and size of the bits, rounding."""

from diffq_fx.kernels.bits import moments, size_of_logits, slope_of_size
from diffq_fx.kernels.memory import release
from diffq_fx.kernels.noise import Noise
from diffq_fx.kernels.ranges import extremes, least_error_range, normal_range, rounding_errors, statistics
from diffq_fx.kernels.round_in_range import RoundInRange, learned_factor, round_to_grid

__all__ = [
    "Noise",
    "RoundInRange",
    "extremes",
    "learned_factor",
    "least_error_range",
    "moments",
    "normal_range",
    "release",
    "round_to_grid",
    "rounding_errors",
    "size_of_logits",
    "slope_of_size",
    "statistics",
]
