"""The loss that whole widths are predicted to cost: the curvature that the first steps measured, times squared rounding errors.

Shape legend: T groups of all weights in one row, as :class:`~diffq_fx.budget.flat_groups.FlatGroups` has them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq_fx.budget import sensitivity
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.budget.rounding_loss import squared_errors, surely_less
from diffq_fx.methods.diffq import DiffQWeight


def is_measured(learned: Sequence[DiffQWeight]) -> bool:
    """Whether the first steps have measured a curvature: they are over, and a gradient reached a weight."""
    sums = [buffer for quantizer in learned if (buffer := quantizer.gradient_sums) is not None]
    return any(bool((each[0] * each[3]).any()) for each in sums)


def errors_at(learned: Sequence[DiffQWeight], groups: FlatGroups, width_T: Tensor) -> Tensor:
    """Squared rounding error of every group at these widths with the weights as they are, shape (T,)."""
    pairs = zip(learned, groups.split(width_T), strict=True)
    return torch.cat([squared_errors(quantizer.rounded_at(width.to(torch.int32))).reshape(-1) for quantizer, width in pairs])


def surely_better(learned: Sequence[DiffQWeight], groups: FlatGroups, width_T: Tensor, than_T: Tensor) -> bool:
    """Whether widths are predicted to cost less loss than others, beyond the noise of the measured curvature."""
    measured = zip(*(sensitivity.measured_curvature(quantizer.get_buffer("gradient_sums")) for quantizer in learned), strict=True)
    curvature_T, variance_T = (torch.cat([each.reshape(-1) for each in own]) for own in measured)
    return surely_less(curvature_T, variance_T, *(errors_at(learned, groups, each_T) for each_T in (width_T, than_T)))
