"""The loss that whole widths are predicted to cost: near the float weights it grows by ``H_g |w - Q_b(w)|^2 / 2`` for each group g.

The first steps measured the curvature H. The rounding error is measured too: it is no ``4^-b`` where a grid has two levels or clips.

Shape legend: T groups of all weights in one row, as :class:`~diffq_fx.budget.flat_groups.FlatGroups` has them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq_fx.budget import sensitivity
from diffq_fx.budget.entropy import RoundedWeight
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.functional.groups import rows_of
from diffq_fx.kernels import rounding_errors
from diffq_fx.methods.diffq import DiffQWeight

_SURE = 2.0
"""Standard errors from which on a difference is taken for one."""


@torch.no_grad()
def squared_errors(weight: RoundedWeight) -> Tensor:
    """Squared rounding error of each group that has a width, ``sum_i (w_i - Q(w_i))^2``, shape of the spec's ``bits_layout``."""
    layout = weight.spec.scale_layout
    errors_RC = torch.zeros(layout.shape, dtype=torch.float32, device=weight.rows.device)
    for part in layout.row_slices(weight.rows.device):
        one = weight.params.of_rows(part).map(lambda values: values[None])
        found_RC = rounding_errors(weight.rows[part], one, rows_of(weight.width, part), layout.of_rows(part))[0]
        rows_of(errors_RC, part).add_(found_RC.float())
    return errors_RC.sum_to_size(weight.spec.bits_layout.shape)


def surely_less(curvature_T: Tensor, variance_T: Tensor, errors_T: Tensor, than_T: Tensor) -> bool:
    """Whether squared errors cost less loss than others, ``sum_g H_g (e_g - f_g) < 0``, by two standard errors of the curvature.

    ``variance_T`` is that of the measured curvature, shape (T,); errors of the groups from :func:`squared_errors`.

    Example:
        >>> curvature, variance = torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0])
        >>> surely_less(curvature, variance, torch.tensor([4.0, 1.0]), torch.tensor([1.0, 4.0]))
        True
    """
    difference_T = errors_T.double() - than_T.double()
    total = torch.dot(curvature_T.double(), difference_T)
    return bool(total < -_SURE * torch.dot(variance_T.double(), difference_T.square()).sqrt())


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
