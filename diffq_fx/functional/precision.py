"""The most exact float of each device (Apple's GPUs have no float64), and types that a move to another leaves alone."""

from collections.abc import Callable

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)


def widest_float(device: torch.device) -> torch.dtype:
    """The float type in which sums over many values are made on this device.

    Example:
        >>> widest_float(torch.device("cpu")), widest_float(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def widened(values: Tensor) -> Tensor:
    """The same values in the device's :func:`widest_float`.

    Example:
        >>> widened(torch.ones(1))
        tensor([1.], dtype=torch.float64)
    """
    return values.to(widest_float(values.device))


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module._apply`` is given, without its change of type: tensors follow to another device and keep their own.

    Example:
        >>> keeping_dtype(Tensor.half)(torch.ones(1)).dtype
        torch.float32
    """

    def moved(tensor: Tensor) -> Tensor:
        applied = move(tensor)
        return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

    return moved
