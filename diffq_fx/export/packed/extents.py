"""Scales that follow from a range and a width, so that a file need not hold one for every group.

Where a range (a row, a tensor) holds groups of several widths, each group's scale is ``extent / (2^b - 1)``: storing the extent of the
range is enough. It is searched for once, when saving, and only taken if it gives every scale back bit by bit.

Legend: O rows, (R, C) groups, E ranges: one for all rows or one for each.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
"""float32 or float64."""


def scales_of(extents: Floats, widths: NDArray[np.uint8]) -> Floats:
    """Scale of each group, as :func:`diffq_fx.functional.quant_params` computes it.

    Args:
        extents: high - low of each range, shape (1, 1) or (O, 1).
        widths: shape (O, C).

    Returns:
        Shape (O, C), in the dtype of ``extents``.

    Example:
        >>> scales_of(np.array([[3.0]], np.float32), np.array([[1, 2]], np.uint8))
        array([[3., 1.]], dtype=float32)
    """
    levels = np.exp2(widths.astype(extents.dtype)) - 1
    scales = extents / levels
    return np.where(scales > np.finfo(scales.dtype).tiny, scales, np.ones_like(scales))


def find_extents(scales: Floats, widths: NDArray[np.uint8]) -> Floats | None:
    """The extents of ranges, one for each row, that give these scales exactly; None if there are none.

    Args:
        scales: shape (O, C).
        widths: shape (O, C).

    Returns:
        Shape (O, 1), or None.

    Example:
        >>> find_extents(np.array([[3.0, 1.0]], np.float32), np.array([[1, 2]], np.uint8))
        array([[3.]], dtype=float32)
        >>> find_extents(np.array([[3.0, 2.0]], np.float32), np.array([[1, 2]], np.uint8)) is None
        True
    """
    column = np.argmin(widths, 1)[:, None]  # the coarsest scale leaves the fewest candidates
    scale, width = np.take_along_axis(scales, column, 1), np.take_along_axis(widths, column, 1)
    found = np.full_like(scale, np.nan)
    for candidate in _candidates(scale * (np.exp2(width.astype(scales.dtype)) - 1)):
        fits = (scales_of(candidate, widths) == scales).all(1, keepdims=True)
        found = np.where(np.isnan(found) & fits, candidate, found)
    return None if np.isnan(found).any() else found


def _candidates(middle: Floats) -> list[Floats]:
    """Floats that may round to the same scale as ``middle``; zero for a range without extent, whose scales are all 1."""
    below, above = np.full_like(middle, -np.inf), np.full_like(middle, np.inf)
    nearest = [np.nextafter(middle, below), np.nextafter(middle, above)]
    return [np.zeros_like(middle), middle, *nearest, np.nextafter(nearest[0], below), np.nextafter(nearest[1], above)]
