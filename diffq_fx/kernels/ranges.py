"""The range of each group of a weight: its extreme weights, what suits normal weights, or what has the least rounding error.

Shape legend: O rows, I columns, R x C grid of groups that share a range, K candidates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupKind, GroupLayout, largest_in, rows_of
from diffq_fx.functional.quantization import AROUND_ZERO, WIDEST_HALF, Grid, QuantParams, dequantize, grid_range, quant_params, quantize
from diffq_fx.kernels import native
from diffq_fx.kernels.draws import span_table

_SHARES = tuple(1 - 0.04 * i for i in range(22))
"""Ends of the range to try, as parts of the extreme weight."""
_HALF_MOVES, _LENGTHS = (-0.5, 0.5), (0.94, 1.06)
"""Of the zero point and of the range, at the end of the search on the "half" grid."""
_SPANS_FROM = 4
"""Bits from which on no weight is clipped where nothing is known."""
_LEAST_SHARE = 1e-6
"""Of the mean importance, for every column."""


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
    the bits, all of shape (R, C). A few passes over the weights; the kernels of :class:`~diffq_fx.kernels.Noise` need none of their own.

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


def least_error_range(
    rows_OI: Tensor,
    layout: GroupLayout,
    bits: Tensor,
    groups: GroupLayout,
    grid: Grid,
    importance_I: Tensor | None = None,
    *,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The range whose grid has the smallest squared rounding error; weights beyond it are clipped to its ends.

    Both ends are first shrunk together, then each alone. ``bits`` are whole numbers, one or one for each of the ``groups``, those with a
    scale of their own; these may be smaller than the groups of ``layout``, which share a range. On the "half" grid the zero point moves
    with the ends, by half a level at a time, and the ends of a range of one width are levels.

    ``importance_I`` is how much the squared errors of each column count, such as the second moment of what it is multiplied with; None, or
    zeros where it is not known: all alike. Where nothing is known and no training makes up for it (``steps`` of it, 0-d, are 0), an error
    counts as much as its weight is large, and from 4 bits on the range spans all weights: large weights meet large inputs more often than
    not, and to clip them as the least error does may ruin the output.

    Example:
        >>> rows = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([9.0])]).reshape(1, -1)  # one outlier
        >>> layout = GroupLayout.of(1, 1000, "channel")
        >>> low, high = least_error_range(rows, layout, torch.tensor([[3]]), layout, "affine")
        >>> bool(high < 6)
        True
        >>> importance = torch.tensor([1.0] * 999 + [1000.0])
        >>> low, high = least_error_range(rows, layout, torch.tensor([[3]]), layout, "affine", importance)
        >>> bool(high < 6)
        False
    """
    where = layout.kind, layout.block, groups.kind, groups.block
    return _least_error_range_op(rows_OI.detach(), bits, importance_I, *where, grid, steps)


@torch.library.custom_op("diffq_fx::least_error_range", mutates_args=())
def _least_error_range_op(  # opaque to compilers: its many candidates would each become code
    rows_OI: Tensor,
    bits: Tensor,
    importance_I: Tensor | None,
    range_kind: str,
    range_block: int,
    group_kind: str,
    group_block: int,
    grid: str,
    steps: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, columns = rows_OI.shape
    layout = GroupLayout(rows, columns, cast("GroupKind", range_kind), range_block)
    groups = GroupLayout(rows, columns, cast("GroupKind", group_kind), group_block)
    grid = cast("Grid", grid)
    low, high = grid_range(*extremes(rows_OI, layout), grid)
    rows_OI = rows_OI.to(low.dtype)
    is_known = importance_I is not None and bool(importance_I.mean().isfinite() & (importance_I.mean() > 0))
    importance_1I = _shares(importance_I)[None] if is_known and importance_I is not None else None
    by_size = steps is not None and not is_known and not bool(steps)
    search = _Search(rows_OI, bits, groups, grid, importance_1I, rows_OI.abs().mean() if by_size else None)
    best = search.best([(low * share, high * share) for share in _SHARES])
    if grid != "symmetric":
        best = search.best([best, *((low * share, best[1]) for share in _SHARES)])
        best = search.best([best, *((best[0], high * share) for share in _SHARES)])
    if grid == "half" and (on_levels := _on_levels(*best, bits)):
        best = search.best(on_levels)
    if by_size:
        spans = -largest_in(-bits.int(), low.shape) >= _SPANS_FROM  # the fewest of a range decide
        return torch.where(spans, low, best[0]), torch.where(spans, high, best[1])
    return best


@_least_error_range_op.register_fake
def _(rows_OI, bits, importance_I, range_kind, range_block, group_kind, group_block, grid, steps):  # noqa: ANN001, ANN202
    rows, columns = rows_OI.shape
    shape = GroupLayout(rows, columns, range_kind, range_block).shape
    dtype = torch.float64 if rows_OI.dtype == torch.float64 else torch.float32
    return rows_OI.new_empty(shape, dtype=dtype), rows_OI.new_empty(shape, dtype=dtype)


def _shares(importance_I: Tensor) -> Tensor:
    """Importance over its mean; columns that no input reaches count a little, for ranges of them alone."""
    return (importance_I / importance_I.mean()).clamp(min=_LEAST_SHARE)


def _on_levels(low: Tensor, high: Tensor, bits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The range with ends that are levels, those half a level lower and higher, each a little shorter and longer; none for mixed widths.

    So ``-low / scale`` is the zero point itself, whatever the ends are multiplied with.
    """
    params, top = quant_params(low, high, bits, "half"), 2 ** bits.to(torch.int32) - 1
    if params.scale.shape != low.shape:
        return []
    scale, zero_point = torch.where(low < high, params.scale, 0), params.known_zero_point()
    moved = [torch.minimum((zero_point + move).clamp(min=0), top) for move in (0, *_HALF_MOVES)]
    moved = [torch.where(bits <= WIDEST_HALF, each, each.round()) for each in moved]
    return [(-each * scale * share, (top - each) * scale * share) for each in moved for share in (1, *_LENGTHS)]


class _Search(NamedTuple):
    """What candidates for the ranges of a weight are compared by."""

    rows: Tensor
    bits: Tensor
    groups: GroupLayout
    grid: Grid
    importance: Tensor | None
    mean_size: Tensor | None
    """Mean of abs(w) where an error counts as much as its weight is large."""

    def best(self, ranges: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """For each group the range with the smallest error; of equals the first."""
        lows_KRC, highs_KRC = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        errors_KRC = torch.zeros_like(lows_KRC)
        for part in self.groups.row_slices(self.rows.device):
            bits = rows_of(self.bits, part)
            rows = slice(None) if lows_KRC.shape[1] == 1 else part
            params = quant_params(lows_KRC[:, rows], highs_KRC[:, rows], bits, self.grid)
            importance = self.importance
            if self.mean_size is not None:
                wide = self.groups.of_rows(part).expand(bits) > 1  # the two levels of 1 bit would go to the largest weights alone
                importance = torch.where(wide, self.rows[part].abs(), self.mean_size)
            errors = rounding_errors(self.rows[part], params, bits, self.groups.of_rows(part), importance)
            errors_KRC[:, rows] += errors.sum_to_size(errors_KRC[:, rows].shape)
        chosen_1RC = errors_KRC.argmin(0, keepdim=True)
        return lows_KRC.gather(0, chosen_1RC)[0], highs_KRC.gather(0, chosen_1RC)[0]


def rounding_errors(rows_OI: Tensor, params_K: QuantParams, bits: Tensor, groups: GroupLayout, importance: Tensor | None = None) -> Tensor:
    """Squared rounding error of each group on each of K grids, times the importance, (1, I) or (O, I), shape (K, R, C)."""
    if params_K.zero_point is not None and native.takes_rows(rows_OI, least=1):
        top = 2 ** bits.to(torch.int32) - 1
        return native.rounding_errors(rows_OI, importance, params_K.scale, params_K.zero_point, top, groups)
    errors = []
    for k in range(len(params_K.scale)):
        params = params_K.map(lambda values, k=k: values[k])
        rounded_OI = dequantize(quantize(rows_OI, params, bits, groups), params, groups)
        squares_OI = (rounded_OI - rows_OI).square()
        errors.append(groups.sum(squares_OI if importance is None else squares_OI * importance))
    return torch.stack(errors)
