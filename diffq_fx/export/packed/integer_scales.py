"""What the kind "integer" asks of scales and zero points.

Where a range (a row, a tensor) holds groups of several widths, each group's scale is ``extent / (2^b - 1)``: storing the extent of the
range is enough. It is searched for once, when saving, and only taken if it gives every scale back bit by bit.

Legend: O rows, (R, C) groups of one scale, E ranges: one for all rows or one for each.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx.functional import QuantParams
from diffq_fx.weights import WeightSpec

WIDTHS = 17  # widths from 0 to 16 bits
WIDEST_HALVES = 15  # bits of a level whose zero point, doubled, is a small integer

Floats = NDArray[Any]  # float32 or float64


def scales_of(extents: Floats, widths: NDArray[np.uint8]) -> Floats:
    """Scale of each group (O, C) of ranges of such extents (E, 1), as :func:`diffq_fx.functional.quant_params` computes it."""
    levels = np.exp2(widths.astype(extents.dtype)) - 1
    scales = extents / levels
    return np.where(scales > np.finfo(scales.dtype).tiny, scales, np.ones_like(scales))


def find_extents(scales: Floats, widths: NDArray[np.uint8]) -> Floats | None:
    """The extents (O, 1) of ranges, one for each row, that give the scales of shape (O, C) exactly; None if there are none."""
    column = np.argmin(widths, 1)[:, None]  # the coarsest scale leaves the fewest candidates
    scale, width = np.take_along_axis(scales, column, 1), np.take_along_axis(widths, column, 1)
    found = np.full_like(scale, np.nan)
    middle = scale * (np.exp2(width.astype(scales.dtype)) - 1)
    # zero for a range without extent, whose scales are all 1, and the floats that may round to the same scale
    for candidate in (np.zeros_like(middle), middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)):
        fits = (scales_of(candidate, widths) == scales).all(1, keepdims=True)
        found = np.where(np.isnan(found) & fits, candidate, found)
    return None if np.isnan(found).any() else found


def array_of(tensor: Any) -> NDArray[Any]:
    """A tensor as an array on the CPU."""
    return tensor.detach().cpu().numpy()


def masks(widths: NDArray[np.uint8], kind: Any) -> NDArray[Any]:
    """``2^b - 1`` of each group."""
    return ((1 << widths.astype(np.int32)) - 1).astype(kind)


def centres(params: QuantParams, widths: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The level of each group that stands for zero or is next to it: residues are counted from there."""
    top = masks(widths, np.int64)
    if params.zero_point is not None:
        return np.clip(np.ceil(array_of(params.zero_point)), 0, top).astype(np.int64)
    with np.errstate(all="ignore"):
        nearest = np.rint(-_doubles(params.offset) / _doubles(params.scale))
    return np.fmin(np.fmax(nearest, 0), top).astype(np.int64)  # not a number is 0


def _doubles(tensor: Any) -> NDArray[np.float64]:
    return array_of(tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.double()).astype(np.float64)


def zero_point_form(zero_point: Tensor | None, widths: NDArray[np.uint8]) -> str:
    """How to store zero points: see :class:`~diffq_fx.export.packed.integer_kind.PackedIntegers`."""
    if zero_point is None:
        return "none"
    doubled, top = 2 * array_of(zero_point).astype(np.float64), masks(widths, np.int64)
    if (doubled == top + 1).all():
        return "middle"
    if (doubled == top).all():
        return "centre"
    if not ((doubled >= 0) & (doubled <= 2 * top) & (doubled == np.rint(doubled))).all():
        return "plain"
    if (doubled % 2 == 0).all():
        return "coded"
    return "halves" if (widths <= WIDEST_HALVES).all() else "plain"


def may_have_extents(spec: WeightSpec, scale_dtype: torch.dtype) -> bool:
    """Whether a range holds groups that may differ in width, so that scales follow from the range and the width."""
    several = spec.bits_layout.num_groups > spec.range_layout.num_groups
    return several and spec.range_layout.kind != "block" and scale_dtype in (torch.float32, torch.float64)


def by_range(shape: tuple[int, ...], spec: WeightSpec) -> tuple[int, int]:
    """The shape (E, groups of a range) of values per group of ``shape``."""
    return (1, shape[0] * shape[1]) if spec.range_layout.kind == "tensor" else (shape[0], shape[1])


def cells(widths: NDArray[np.uint8], spec: WeightSpec) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The width of each *cell*, a range and a width that occur together, in rising order; and the cell of each of the groups (O, C)."""
    of_row = np.zeros(len(widths), np.int64) if spec.range_layout.kind == "tensor" else np.arange(len(widths))
    key = (of_row[:, None] * WIDTHS + widths).reshape(-1)
    present = np.zeros(WIDTHS * (int(of_row.max(initial=0)) + 1), np.bool_)
    present[key] = True
    return (np.flatnonzero(present) % WIDTHS).astype(np.uint8), (np.cumsum(present) - 1)[key]
