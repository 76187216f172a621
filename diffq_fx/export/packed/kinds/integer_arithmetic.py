"""Codes of the kind "integer" to levels and weights, in few passes over small types. Everything broadcasts with the codes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq_fx.export.packed.coding.bitplanes import Values

Numbers = Any
"""An array that broadcasts with the codes, or one number, in their type."""


def unfold(codes: Values, centre: Numbers, top: Numbers) -> Values:
    """Levels of codes: ``centre + 0, -1, 1, -2, ... mod top + 1``.

    Args:
        codes: uint8 or uint16.
        centre: in the type of the codes.
        top: ``2^b - 1``, in the type of the codes.

    Example:
        >>> unfold(np.array([0, 1, 2, 7], np.uint8), np.uint8(3), np.uint8(7))
        array([3, 2, 4, 7], dtype=uint8)
    """
    one = codes.dtype.type(1)
    levels = codes >> one
    levels ^= -(codes & one)  # unsigned: 0, 1, 2, 3 are 0, -1, 1, -2
    levels += centre
    levels &= top
    return levels


def dequantize_coded(levels: Values, zero_point: Numbers, scale: Numbers, width: int, out: NDArray[np.float32]) -> None:
    """``(level - zero_point) * scale`` for levels and zero points of ``width`` bits or fewer, both in one type."""
    np.copyto(out, _difference(levels, zero_point, width))
    out *= scale


def dequantize_plain(levels: Values, zero_point: NDArray[np.int32], scale: Numbers, out: NDArray[np.float32]) -> None:
    """``(level - zero_point) * scale`` for any zero points."""
    np.copyto(out, levels - zero_point, casting="unsafe")
    out *= scale


def dequantize_offset(levels: Values, scale: Numbers, offset: Numbers, out: NDArray[np.float32]) -> None:
    """``level * scale + offset``."""
    np.copyto(out, levels)
    out *= scale
    out += offset


def _difference(levels: Values, zero_point: Numbers, width: int) -> NDArray[Any]:
    """``levels - zero_point`` in the smallest signed type that holds the difference of two levels of ``width`` bits."""
    if width < 8 * levels.itemsize:
        return (levels - zero_point).view(np.int8 if levels.itemsize == 1 else np.int16)  # unsigned numbers wrap to the same bits
    return np.subtract(levels, zero_point, dtype=np.int16 if levels.itemsize == 1 else np.int32)
