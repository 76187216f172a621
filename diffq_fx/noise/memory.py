"""Memory for noisy weights that is used again at the next step.

A large block that torch frees goes back to the system, and taking it again, page by page, costs more than filling it with noise
does. The noisy weights of all layers live at the same time between forward and backward, so keeping their memory makes no peak higher.
"""

import weakref

import torch
from torch import Tensor

_WORTH_KEEPING = 1 << 20
"""Bytes below which the allocator itself keeps what is freed."""

_free: dict[int, list[Tensor]] = {}


def empty_like(weight: Tensor) -> Tensor:
    """A tensor like a contiguous float32 weight on the CPU, of memory that a dead one of the same size has left, if there is any."""
    if weight.nbytes < _WORTH_KEEPING:
        return torch.empty_like(weight)
    blocks = _free.setdefault(weight.numel(), [])
    block = blocks.pop() if blocks else torch.empty(weight.numel())
    lent = block.numpy()[:]  # an array of its own, which dies with the tensor made of it and with all of that one's views
    weakref.finalize(lent, blocks.append, block).atexit = False
    return torch.from_numpy(lent).view(weight.shape)


def release() -> None:
    """Give what is kept back to the system; what is in use follows when it dies."""
    _free.clear()
