"""Widths by the loss that they are predicted to cost: near the float weights it grows by ``H_g |w - Q_b(w)|^2 / 2`` for each group g.

The curvature H is measured. So is the rounding error at each width, which is no ``4^-b`` where a grid has two levels or clips.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffq_fx.budget.allocation import fill_up
from diffq_fx.budget.entropy import RoundedWeight
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.budget.size import exact_bits
from diffq_fx.functional import QuantParams
from diffq_fx.kernels import rounding_errors

_PRICES = 60
"""Halvings of the logarithm of the price of a bit."""
_CHEAPEST = 1e-18
"""The lowest price of a bit, as a part of the highest."""
_FILL_ROUNDS = 4
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


@torch.no_grad()
def least_loss_widths(groups: FlatGroups, losses: Mapping[int, Tensor], budget_bits: int) -> Tensor:
    """The widths whose loss is the least among those whose exact size is within a budget; int32, shape (T,).

    ``min_b sum_g loss_g(b_g)`` with ``size(b) <= budget``: at a price of a bit every group has the width with the least
    ``loss + price * bits``, and the price is the one at which the budget is met (Shoham and Gersho, 1988). What is left of the budget goes
    to the groups that gain the most for each bit.

    Args:
        groups: all groups of a model, and the widths that each may have.
        losses: by every width that a group may have, the loss that each group costs at it, shape (T,), such as
            ``curvature_T / 2 * squared_errors``.
        budget_bits: size as :func:`~diffq_fx.budget.size.exact_bits` counts it.

    Returns:
        The widths, on the device of the groups; the narrowest where the budget is out of reach.

    Example:
        >>> from diffq_fx.weights import WeightSpec
        >>> groups = FlatGroups([WeightSpec(name="w", shape=(2, 64), axis=0)], torch.device("cpu"))
        >>> losses = {width: torch.tensor([1.0, 9.0]) * 4.0**-width for width in range(1, 17)}
        >>> least_loss_widths(groups, losses, 4 * 2 * 64 + 100)
        tensor([3, 5], dtype=torch.int32)
    """
    ladder_K = torch.tensor(sorted(losses), dtype=torch.float64)
    loss_TK = torch.stack([losses[width].detach().cpu().double() for width in sorted(losses)], 1)
    for k, width in enumerate(sorted(losses)):
        allowed_T = groups.by_limits(lambda own, limits, width=width: torch.full_like(own, width in limits.widths), groups.values_T)
        loss_TK[:, k].masked_fill_(allowed_T.cpu() == 0, torch.inf)
    values_T = groups.values_T.cpu().double()
    finite = loss_TK[loss_TK.isfinite()]
    dear = float(finite.max() - finite.min()) + 1e-300  # no upgrade is worth that much a bit
    cheap = dear * _CHEAPEST
    best_T, over_T = (_at_price(loss_TK, ladder_K, values_T, price) for price in (dear, cheap))
    for _ in range(_PRICES):
        price = math.sqrt(cheap * dear)
        width_T = _at_price(loss_TK, ladder_K, values_T, price)
        if exact_bits(groups, width_T.to(groups.device)) <= budget_bits:
            dear, best_T = price, width_T
        else:
            cheap, over_T = price, width_T
    return _filled(groups, loss_TK, ladder_K, best_T, over_T, budget_bits).to(groups.device, torch.int32)


def _at_price(loss_TK: Tensor, ladder_K: Tensor, values_T: Tensor, price: float) -> Tensor:
    """The width of each group with the least loss and price together."""
    return ladder_K[(loss_TK + price * values_T[:, None] * ladder_K).argmin(1)]


def _filled(groups: FlatGroups, loss_TK: Tensor, ladder_K: Tensor, width_T: Tensor, over_T: Tensor, budget_bits: int) -> Tensor:
    """What the budget leaves for the groups that gain the most for each bit, up to ``over_T`` or one width up."""
    values_T = groups.values_T.cpu().double()
    above_T = torch.where(over_T > width_T, over_T, ladder_K[(torch.bucketize(width_T, ladder_K) + 1).clamp(max=len(ladder_K) - 1)])
    now_T, then_T = (loss_TK.gather(1, torch.bucketize(each, ladder_K)[:, None])[:, 0] for each in (width_T, above_T))
    gain_T = ((now_T - then_T) / (values_T * (above_T - width_T))).nan_to_num(0, 0, 0)
    order = torch.argsort(gain_T, descending=True, stable=True)
    order = order[gain_T[order] > 0]
    room = budget_bits - exact_bits(groups, width_T.to(groups.device))
    for _ in range(_FILL_ROUNDS):  # wider widths may take more to code
        filled_T = fill_up(width_T, above_T, values_T, order, room)
        excess = exact_bits(groups, filled_T.to(groups.device)) - budget_bits
        if excess <= 0:
            return filled_T
        room -= excess
    return width_T


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
