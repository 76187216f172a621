"""Memory for large tensors that are made anew at every step: it is used again.

A large block that torch frees goes back to the system, and taking it again, page by page, costs more than filling it with noise
does. The noisy weights of all layers live at the same time between forward and backward, so keeping their memory makes no peak higher.
"""

import ctypes
import math
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from diffq_fx import _compat

_WORTH_KEEPING = 1 << 18
"""Bytes below which the allocator itself keeps what is freed."""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""glibc keeps freed memory, hundreds of MiB after a large model, which the large tensors of onnxruntime come on top of."""

_free: dict[int, list[Tensor]] = {}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; a large one on the CPU takes the memory that a dead one of the same size has left."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _WORTH_KEEPING:
        return torch.empty(shape, dtype=dtype, device=device)
    blocks = _free.setdefault(size, [])
    try:
        block = blocks.pop()
    except IndexError:
        block = torch.empty(size, dtype=torch.uint8)
    lent = block.numpy()  # an array of its own, which dies with the tensor made of it and with all of that one's views
    weakref.finalize(lent, blocks.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def recorded() -> bool:
    """Whether a compiler or tracer records operations: what they make has no memory, and it would miss kernels past torch's dispatcher."""
    return torch.compiler.is_compiling() or _compat.in_dispatch_mode()


def release() -> None:
    """Give what is kept here, and what the allocator keeps, back to the system; what is in use follows when it dies."""
    _free.clear()
    if _trim is not None:
        _trim(0)
