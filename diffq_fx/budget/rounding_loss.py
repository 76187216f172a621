"""The loss that rounding is predicted to cost: near the float weights it grows by ``H_g |w - Q_b(w)|^2 / 2`` for each group g.

The curvature H is measured. So is the rounding error at each width, which is no ``4^-b`` where a grid has two levels or clips.
"""

import torch
from torch import Tensor

from diffq_fx.budget.entropy import RoundedWeight
from diffq_fx.functional import QuantParams
from diffq_fx.kernels import rounding_errors

_SURE = 2.0
"""Standard errors from which on a difference is taken for one."""


@torch.no_grad()
def squared_errors(weight: RoundedWeight) -> Tensor:
    """Squared rounding error of each group that has a width, ``sum_i (w_i - Q(w_i))^2``, shape of the spec's ``bits_layout``."""
    layout = weight.spec.scale_layout
    errors_RC = torch.zeros(layout.shape, dtype=torch.float32, device=weight.rows.device)
    for part in layout.row_slices(weight.rows.device):
        width = weight.width if weight.width.shape[0] == 1 else weight.width[part]
        scale, *others = weight.params.of_rows(part)
        one = QuantParams(scale[None], *(None if each is None else each[None] for each in others))
        found_RC = rounding_errors(weight.rows[part], one, width, layout.of_rows(part))[0].float()
        (errors_RC if len(errors_RC) == 1 else errors_RC[part]).add_(found_RC)
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
