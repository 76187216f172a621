"""What noise is made of: one seed a draw, and the bytes that are a hash of it.

The noise of weight i is byte ``i % 8`` of word ``i // 8``, and a word is splitmix64's finaliser of the seed and the word's own place. So
C (``noise.c``), Triton (``triton_kernels.py``) and torch's operations (here) draw the same, and a seed is all that the backward needs.
"""

import functools

import torch
from torch import Tensor

from diffq_fx.kernels.memory import recorded

GAUSSIAN_STD = 0.5
"""The paper's Gaussian noise is ``(step / 2) N(0, 1)``; uniform noise, ``(step / 2) U[-1, 1]``, has std 1/sqrt(12)."""
SPAN_OF_NORMAL = (1.596, 2.987, 4.102, 5.028, 5.832, 6.556, 7.222, 7.844, 8.431, 8.988, 9.518, 10.026, 10.51, 10.98, 11.43, 11.87)
"""For 1 to 16 bits the span, in standard deviations, of the uniform quantizer with the least squared error for normal weights."""

_GOLDEN = 0x9E3779B97F4A7C15  # odd, from the golden ratio: consecutive places, and ranks, land far apart
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_ODD = 0x0101010101010101  # or-ed into each byte: odd bytes are symmetric about zero


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed of 63 bits on the device, int64, shape (1,): of the device's own generator and the rank.

    So ``torch.manual_seed`` repeats a run, activation checkpointing recomputes the same noise, and ranks that were seeded alike
    still draw different noise. Nothing waits for the device, and a CUDA graph that is replayed draws anew.
    """
    seed, rank = torch.randint(2**62, (1,), device=device), _rank()
    return seed.add_(rank * _GOLDEN % 2**63).bitwise_and_(2**63 - 1) if rank else seed


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def noise_bytes(seed: Tensor, first: int, count: int) -> Tensor:
    """Noise of the weights from number ``first`` on: int8, uniform over the odd numbers from -127 to 127, shape (count,).

    128 values centred on zero: as noise, ``byte / 256``, mean 0 and variance 1/12 to within 6e-6.

    Example:
        >>> noise_bytes(torch.tensor([1]), 0, 12)[6:].equal(noise_bytes(torch.tensor([1]), 6, 6))
        True
    """
    words = torch.arange(first // 8, -(-(first + count) // 8), device=seed.device).mul_(_GOLDEN - 2**64).add_(seed)
    for shift, factor in _ROUNDS:
        words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1))  # the shift of a signed word copies its sign
        if factor != 1:
            words.mul_(factor - 2**64)  # the int64 with the bits of this word
    return words.bitwise_or_(_ODD).view(torch.int8)[first % 8 : first % 8 + count]


def gaussian_table(device: torch.device, in_memory: bool = False) -> Tensor:
    """Noise of each odd byte from -127 to 127, in steps: 128 normal quantiles, brought to exactly :data:`GAUSSIAN_STD`.

    ``in_memory`` is for kernels that take its address, and so run on real tensors, even while a compiler makes its first call.
    """
    return _table(_normal_quantiles(), device, torch.float32, in_memory)


def span_table(device: torch.device, dtype: torch.dtype = torch.float32, in_memory: bool = False) -> Tensor:
    """:data:`SPAN_OF_NORMAL` on the device; see :func:`gaussian_table`."""
    return _table(SPAN_OF_NORMAL, device, dtype, in_memory)


def _table(values: tuple[float, ...], device: torch.device, dtype: torch.dtype, in_memory: bool) -> Tensor:
    """A constant, copied to each device once; a graph that is being recorded gets its own, since what it makes is no memory."""
    return torch.tensor(values, dtype=dtype, device=device) if recorded() and not in_memory else _kept_table(values, device, dtype)


@functools.cache
def _kept_table(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@functools.cache
def _normal_quantiles() -> tuple[float, ...]:
    middle = (torch.arange(128, dtype=torch.float64, device="cpu") + 0.5) / 128
    quantiles = torch.special.ndtri(middle)
    quantiles *= GAUSSIAN_STD / quantiles.square().mean().sqrt()
    return tuple(quantiles.tolist())
