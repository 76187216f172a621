"""The range of each group of a weight: its extreme weights, what suits normal weights, or what has the least rounding error.

Shape legend: O rows, I columns, R x C grid of groups that share a range, K candidates.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupKind, GroupLayout
from diffq_fx.functional.quantization import AROUND_ZERO, Grid, QuantParams, dequantize, grid_range, quant_params, quantize
from diffq_fx.kernels import native
from diffq_fx.kernels.draws import span_table

_SHARES = tuple(1 - 0.04 * i for i in range(22))
"""Ends of the range to try, as parts of the extreme weight."""


def statistics(rows_OI: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smallest and largest weight, sum and sum of squares of each group, in float32 or better; without autograd.

    All of shape (R, C), and NaN where a weight of the group is NaN.

    Example:
        >>> [each.item() for each in statistics(torch.tensor([[1.0, -2.0, 2.0]]), GroupLayout.of(1, 3, "tensor"))]
        [-2.0, 2.0, 1.0, 9.0]
    """
    rows_OI = rows_OI.detach()
    if native.takes_rows(rows_OI):
        low, high, total, square = native.statistics(rows_OI, layout)
    else:
        by_row = GroupLayout.of(layout.rows, layout.columns, "channel") if layout.kind == "tensor" else layout
        parts = [_statistics_of(rows_OI[part], by_row.of_rows(part)) for part in layout.row_slices(rows_OI.device)]
        low, high, total, square = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
    if layout.kind != "tensor":
        return low, high, total, square
    return low.amin().view(1, 1), high.amax().view(1, 1), total.sum().view(1, 1), square.sum().view(1, 1)


def extremes(rows_OI: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, shape (R, C), in the weight's dtype; without autograd.

    Example:
        >>> extremes(torch.tensor([[1.0, -2.0, 3.0]]), GroupLayout.of(1, 3, "channel"))
        (tensor([[-2.]]), tensor([[3.]]))
    """
    rows_OI = rows_OI.detach()
    return statistics(rows_OI, layout)[:2] if native.takes_rows(rows_OI) else layout.aminmax(rows_OI)


def _statistics_of(rows_OI: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_OI = rows_OI.to(torch.promote_types(rows_OI.dtype, torch.float32))
    square = torch.linalg.vector_norm(layout.blocks(rows_OI), dim=-1).square_()  # no pass to write the squares
    return *layout.aminmax(rows_OI), layout.sum(rows_OI), square


def normal_range(rows_OI: Tensor, layout: GroupLayout, bits: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The range that suits normal weights of this width: ``mean +- span(b) std / 2``, within the extreme weights (Max, 1960, table II).

    ``bits``, from 1 to 16, may be fractional. It makes both ends, and how fast the logarithm to base 2 of what is between them grows with
    the bits, all of shape (R, C). A few passes over the weights; :class:`~diffq_fx.kernels.OnePass` needs none of its own.

    Example:
        >>> low, high, _ = normal_range(torch.randn(1, 9999), GroupLayout.of(1, 9999, "channel"), torch.tensor([[2.0]]), "affine")
        >>> bool(-1.7 < low < -1.3) and bool(1.3 < high < 1.7)
        True
    """
    rows_OI = rows_OI.detach()
    low, high, total, square = statistics(rows_OI, layout)
    low, high = grid_range(low, high, grid)
    counts = layout.counts_on(low.device)
    mean = total / counts if grid != "symmetric" else torch.zeros_like(low)
    variance = square / counts - mean.square()
    table = span_table(low.device, low.dtype)
    below = (bits - 1).nan_to_num(0).clamp(0, len(table) - 2).floor()
    index = below.long()
    span = torch.lerp(table[index], table[index + 1], (bits - 1 - below).clamp(0, 1).to(low.dtype))
    half_std = variance.clamp(min=0).sqrt() / 2
    inner_low, inner_high = mean - half_std * span, mean + half_std * span
    free = grid not in AROUND_ZERO
    moving = (inner_low > low) & ((inner_low < 0) | free), (inner_high < high) & ((inner_high > 0) | free)
    low, high = torch.maximum(low, inner_low), torch.minimum(high, inner_high)
    low, high = (low, high) if free else (low.clamp(max=0), high.clamp(min=0))
    ends = (moving[0].to(low.dtype) + moving[1].to(low.dtype)) * ((bits >= 1) & (bits <= 16))
    growth = ends * half_std * (table[index + 1] - table[index]) / math.log(2)
    return low, high, torch.where(high > low, growth / (high - low), 0)


def normal_span(rows_OI: Tensor, layout: GroupLayout, bits: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The length of :func:`normal_range` and how its logarithm grows."""
    low, high, growth = normal_range(rows_OI, layout, bits, grid)
    return high - low, growth


def least_error_range(rows_OI: Tensor, layout: GroupLayout, bits: Tensor, groups: GroupLayout, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range whose grid has the smallest squared rounding error; weights beyond it are clipped to its ends.

    Both ends are first shrunk together, then each alone. ``bits`` are whole numbers, one or one for each of the ``groups``, those with a
    scale of their own; these may be smaller than the groups of ``layout``, which share a range.

    Example:
        >>> rows = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([9.0])]).reshape(1, -1)  # one outlier
        >>> layout = GroupLayout.of(1, 1000, "channel")
        >>> low, high = least_error_range(rows, layout, torch.tensor([[3]]), layout, "affine")
        >>> bool(high < 6)
        True
    """
    return _least_error_range_op(rows_OI.detach(), bits, layout.kind, layout.block, groups.kind, groups.block, grid)


@torch.library.custom_op("diffq_fx::least_error_range", mutates_args=())
def _least_error_range_op(  # opaque to compilers: its many candidates would each become code
    rows_OI: Tensor, bits: Tensor, range_kind: str, range_block: int, group_kind: str, group_block: int, grid: str
) -> tuple[Tensor, Tensor]:
    rows, columns = rows_OI.shape
    layout = GroupLayout(rows, columns, cast("GroupKind", range_kind), range_block)
    groups = GroupLayout(rows, columns, cast("GroupKind", group_kind), group_block)
    grid = cast("Grid", grid)
    low, high = grid_range(*extremes(rows_OI, layout), grid)
    rows_OI = rows_OI.to(low.dtype)
    best = _best([(low * share, high * share) for share in _SHARES], rows_OI, bits, groups, grid)
    if grid != "symmetric":
        best = _best([best, *((low * share, best[1]) for share in _SHARES)], rows_OI, bits, groups, grid)
        best = _best([best, *((best[0], high * share) for share in _SHARES)], rows_OI, bits, groups, grid)
    return best


@_least_error_range_op.register_fake
def _(rows_OI, bits, range_kind, range_block, group_kind, group_block, grid):  # noqa: ANN001, ANN202
    rows, columns = rows_OI.shape
    shape = GroupLayout(rows, columns, range_kind, range_block).shape
    dtype = torch.float64 if rows_OI.dtype == torch.float64 else torch.float32
    return rows_OI.new_empty(shape, dtype=dtype), rows_OI.new_empty(shape, dtype=dtype)


def _best(ranges: Sequence[tuple[Tensor, Tensor]], rows_OI: Tensor, bits: Tensor, groups: GroupLayout, grid: Grid) -> tuple[Tensor, Tensor]:
    """For each group the range with the smallest error; of equals the first."""
    lows_KRC, highs_KRC = (torch.stack(ends) for ends in zip(*ranges, strict=True))
    errors_KRC = torch.zeros_like(lows_KRC)
    for part in groups.row_slices(rows_OI.device):
        part_bits = bits if bits.shape[0] == 1 else bits[part]
        rows = slice(None) if lows_KRC.shape[1] == 1 else part
        params = quant_params(lows_KRC[:, rows], highs_KRC[:, rows], part_bits, grid)
        errors = _rounding_errors(rows_OI[part], params, part_bits, groups.of_rows(part))
        errors_KRC[:, rows] += errors.sum_to_size(errors_KRC[:, rows].shape)
    chosen_1RC = errors_KRC.argmin(0, keepdim=True)
    return lows_KRC.gather(0, chosen_1RC)[0], highs_KRC.gather(0, chosen_1RC)[0]


def _rounding_errors(rows_OI: Tensor, params_K: QuantParams, bits: Tensor, groups: GroupLayout) -> Tensor:
    """Squared rounding error of each group on each of K grids, shape (K, R, C)."""
    if params_K.zero_point is not None and native.takes_rows(rows_OI):
        top = 2 ** bits.to(torch.int32) - 1
        return native.rounding_errors(rows_OI, params_K.scale, params_K.zero_point, top, groups)
    errors = []
    for k, scale in enumerate(params_K.scale):
        params = QuantParams(scale, *(None if each is None else each[k] for each in (params_K.zero_point, params_K.offset)))
        rounded_OI = dequantize(quantize(rows_OI, params, bits, groups), params, groups)
        errors.append(groups.sum((rounded_OI - rows_OI).square()))
    return torch.stack(errors)
