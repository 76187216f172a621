"""Widths of the least predicted loss: a rule for the bits that benchmarks/curvature.py compares with that of training."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffq_fx.budget.allocation import fill_up
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.budget.sensitivity import without_doubt
from diffq_fx.budget.size import exact_bits
from diffq_fx.weights import WeightSpec

_PRICES = 60
"""Halvings of the logarithm of the price of a bit."""
_CHEAPEST = 1e-18
"""The lowest price of a bit, as a part of the highest."""
_FILL_ROUNDS = 4
_LEAST_RATIO = 0.1
"""What is measured of a weight does not bring its curvature below this part of what its gradients say."""


def curvatures(specs: Sequence[WeightSpec], sums: Sequence[Tensor]) -> Tensor:
    """H of every group, shape (T,), never negative: F, times the ratio of the measured H to F.

    Under the noise of all weights at once F is in proportion to H, not to its square: what the noise of others does to the outputs is as a
    gradient noise of the batches (docs/accuracy.md). The ratio is that of each weight as far as it is known, else that of the model.
    """
    squares = [without_doubt(*each) for each in zip(specs, sums, strict=True)]
    measured_W = torch.stack([(own[2] * own[3]).sum() for own in sums])
    expected_W = torch.stack([(square * own[3]).sum() for square, own in zip(squares, sums, strict=True)]).clamp(min=1e-30)
    variance_W = torch.stack([(own[0] * own[3]).sum() for own in sums]) / expected_W.square()
    of_model = measured_W.sum() / expected_W.sum()
    if not bool(of_model > 0):
        return torch.cat([square.reshape(-1) for square in squares])
    known_W = of_model.square() / (of_model.square() + variance_W)
    ratio_W = torch.lerp(of_model, measured_W / expected_W, known_W).clamp(min=_LEAST_RATIO * of_model)
    return torch.cat([(square * ratio).reshape(-1) for square, ratio in zip(squares, ratio_W, strict=True)])


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
