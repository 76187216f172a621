"""Ranges that are chosen for the rounding error and not by the extreme weights alone.

Shape legend: O rows, I columns, R x C grid of groups, G = R C groups in a row, S weights in each, B bins.
"""

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.functional.grid import Grid
from diffq_fx.functional.groups import GroupLayout

_BINS = 512
_SHRINKAGES = tuple(1 - 0.02 * i for i in range(46))
"""Ends of the range to try, as parts of the extreme weight."""


def histogram_range(rows_OI: Tensor, layout: GroupLayout, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range whose grid has the smallest squared rounding error over a histogram of each group, Quant-Noise (arXiv:2004.07320).

    Weights beyond the range are clipped to its ends. Both ends are first shrunk together, then each alone.

    Differs from the paper: there it is PyTorch's HistogramObserver, per tensor and with a running histogram of earlier steps.

    Args:
        rows_OI: weight rows, shape (O, I).
        layout: the groups that share a range.
        bits: width.
        grid: "affine" or "symmetric".

    Returns:
        Two tensors of shape (R, C), within the smallest and the largest weight of each group.

    Example:
        >>> rows = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([9.0])]).reshape(1, -1)  # one outlier
        >>> low, high = histogram_range(rows, GroupLayout.of(1, 1000, "tensor"), 3, "affine")
        >>> bool(high < 6)
        True
    """
    low, high = functional.weight_range(rows_OI, layout, grid)
    centres_GB, counts_GB = _histogram(rows_OI.to(low.dtype), layout)
    lows = [low.reshape(-1, 1) * share for share in _SHRINKAGES]
    highs = [high.reshape(-1, 1) * share for share in _SHRINKAGES]
    best_low, best_high = _best(list(zip(lows, highs, strict=True)), centres_GB, counts_GB, bits, grid)
    if grid == "affine":
        best_low, best_high = _best([(each, best_high) for each in lows], centres_GB, counts_GB, bits, grid)
        best_low, best_high = _best([(best_low, each) for each in highs], centres_GB, counts_GB, bits, grid)
    return best_low.reshape(low.shape), best_high.reshape(low.shape)


def _histogram(rows_OI: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Centres of the bins of each group and how many weights are in them."""
    low, high = layout.aminmax(rows_OI)
    if layout.kind == "tensor":
        values_GS, counted_GS = rows_OI.reshape(1, -1), torch.ones_like(rows_OI).reshape(1, -1)
    else:
        values_GS, counted_GS = (layout.blocks(t).reshape(layout.num_groups, -1) for t in (rows_OI, torch.ones_like(rows_OI)))
    low_G1, width_G1 = low.reshape(-1, 1), (high - low).reshape(-1, 1) / _BINS
    index_GS = ((values_GS - low_G1) / width_G1.clamp(min=torch.finfo(low.dtype).tiny)).long().clamp_(0, _BINS - 1)
    counts_GB = torch.zeros(len(values_GS), _BINS, dtype=low.dtype, device=low.device).scatter_add_(1, index_GS, counted_GS)
    middle_B = torch.arange(_BINS, dtype=low.dtype, device=low.device) + 0.5
    return low_G1 + middle_B * width_G1, counts_GB


def _best(ranges: list[tuple[Tensor, Tensor]], centres_GB: Tensor, counts_GB: Tensor, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """For each group the range with the smallest error; of equals the first."""
    groups, bins = centres_GB.shape
    layout = GroupLayout.of(groups, bins, "channel")
    width = torch.full((groups, 1), bits, dtype=torch.int32, device=centres_GB.device)
    errors = []
    for low_G1, high_G1 in ranges:
        params = functional.quant_params(low_G1, high_G1, width, grid)
        rounded_GB = functional.dequantize(functional.quantize(centres_GB, params, width, layout), params, layout)
        errors.append(((rounded_GB - centres_GB).square() * counts_GB).sum(1))
    best_1G = torch.stack(errors).argmin(0, keepdim=True)
    low, high = (torch.stack(ends).squeeze(-1).gather(0, best_1G).reshape(-1, 1) for ends in zip(*ranges, strict=True))
    return low, high
