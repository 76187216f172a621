"""Whether values have changed, whatever wrote them: torch counts the writes to a tensor, but not those through ``.data`` or its memory."""

import ctypes
import functools
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from diffq_fx.kernels import extension, native

_PIECE = 1 << 22
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


@functools.cache
def fast_zlib() -> ModuleType:
    """isal's zlib, whose checksum runs at the speed of memory, or zlib itself where it is not installed; the interface is the same."""
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return zlib
    return isal_zlib


def checksum(tensors: Iterable[Tensor]) -> int | None:
    """A number that is another one after any write to these tensors (but for a chance of 2^-32).

    None where a tensor lies where the processor cannot read it or stands for other memory (a DTensor).

    Example:
        >>> weight = torch.ones(3)
        >>> before = checksum([weight])
        >>> weight.data.mul_(2)
        tensor([2., 2., 2.])
        >>> checksum([weight]) == before
        False
    """
    kept = list(tensors)
    if not all(tensor.device.type == "cpu" and native.is_plain(tensor) for tensor in kept):
        return None
    kept = [tensor if tensor.is_contiguous() else tensor.detach().contiguous() for tensor in kept]
    if extension.kernels() is not None:
        return native.checksum(kept)
    value = 0
    for tensor in kept:
        if tensor.numel():  # read in place: numpy() would fix the size of the storage, which FSDP changes
            value = fast_zlib().crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), value)
    return value


def device_checksum(tensors: Iterable[Tensor]) -> int:
    """The same for tensors on any device, at the price of waiting for it once."""
    kept = list(tensors)
    value = checksum(kept)
    if value is not None:
        return value
    total = 0
    for number, tensor in enumerate(kept):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]
        words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in words.split(_PIECE):
            places = torch.arange(1, len(piece) + 1, dtype=torch.int64, device=piece.device)
            total = total * 31 + ((places + number) * _ODD * (piece.long() + 1)).sum()
    return int(total)
