"""Where the randomness of the noise comes from: one seed a draw, and what its bytes mean."""

import functools

import torch
from torch import Tensor

GAUSSIAN_STD = 0.5
"""The paper's Gaussian noise is ``(step / 2) N(0, 1)``; uniform noise, ``(step / 2) U[-1, 1]``, has std 1/sqrt(12)."""

_RANK_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, from the golden ratio: consecutive ranks land far apart


def draw_seed() -> int:
    """A fresh seed of 63 bits, of torch's default CPU generator and the rank.

    So ``torch.manual_seed`` repeats a run, activation checkpointing recomputes the same noise, and ranks that were seeded alike
    still draw different noise.
    """
    seed = int(torch.randint(2**62, (1,)))
    distributed = torch.distributed
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return (seed + rank * _RANK_MULTIPLIER) % 2**63


@functools.cache
def gaussian_table(device: torch.device) -> Tensor:
    """Noise of each odd byte from -127 to 127, in steps: 128 normal quantiles, brought to exactly :data:`GAUSSIAN_STD`."""
    middle = (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    quantiles = torch.special.ndtri(middle)
    quantiles *= GAUSSIAN_STD / quantiles.square().mean().sqrt()
    return quantiles.float().to(device)
