"""Rounding the trained bits of all groups to whole widths, so that the exact size meets a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.budget.size import exact_bits

_PAYLOAD_ROUNDS = 20
_CLOSE_ENOUGH = 1e-3
_LAST_GROUPS = 4096
_CODING_ROUNDS = 8
CLOSE_ENOUGH_CODED = 2e-3
_MANY_GROUPS = 1 << 17
_BINS = 1 << 14


def allocate_widths(groups: FlatGroups, bits_T: Tensor, budget_bits: int) -> Tensor:
    """Round the bits of all groups so that the exact size comes as close to a budget as it can without exceeding it; int32, shape (T,).

    Every group gets the allowed width below its bits; the budget's remainder goes, one allowed width up each, to the groups that are
    furthest on the way there. Where the trained bits are off the budget they are first shifted together until they meet it. Weights that
    share a width are one group in this, which takes what all of them take.
    """
    bits = bits_T.cpu().double()
    values = groups.at_firsts(groups.values_T.cpu().double())
    coding = float(groups.coding_bits(bits_T.round()))
    # What the coding of the widths takes depends on the widths: search the payload that leaves just enough for it.
    most = budget_bits - groups.fixed_bits
    parts = [Part(alike.of(values), alike.of(bits), alike.limits.widths[0], alike.limits.widths[-1]) for alike in groups.alike]
    least = most - sum(math.ceil(math.log2(1 + part.high - part.low)) * len(part.bits) for part in parts)
    payload, best = most - coding, groups.by_limits(lambda own, limits: torch.full_like(own, limits.widths[0]), bits)
    for _ in range(_PAYLOAD_ROUNDS):
        shifted = bits + common_shift(parts, payload)
        width = groups.as_firsts(_largest_remainder(groups, shifted, values, payload))
        exact = exact_bits(groups, width.to(bits_T.device))
        if exact <= budget_bits:
            least, best = payload, width
        else:
            most = payload
        if 0 <= budget_bits - exact <= _CLOSE_ENOUGH * budget_bits:
            break
        payload = (least + most) / 2
    return best.to(bits_T.device, torch.int32)


def allocate_coded_widths(
    groups: FlatGroups, within: Callable[[int], Tensor], target_bits: int, saved: int, saved_at: Callable[[Tensor], int]
) -> Tensor:
    """Widths whose entropy-coded size is within a target: what coding saves depends on them, and the other way round; int32, shape (T,).

    ``within`` gives the widths of a budget before coding, ``saved`` is what coding takes off, about; ``saved_at`` what it takes off these
    widths.
    """
    best, fits, exceeds, budget = None, -math.inf, math.inf, target_bits + saved
    for _ in range(_CODING_ROUNDS):
        width_T = within(budget)
        before_coding = exact_bits(groups, width_T)
        room = target_bits + saved_at(width_T) - before_coding
        if room < 0:
            exceeds = budget
        else:
            best, fits = width_T, budget
            if room <= CLOSE_ENOUGH_CODED * target_bits:
                break
        budget = before_coding + room
        if not fits < budget < exceeds:  # what is saved goes up and down in turn
            if exceeds - fits == math.inf:
                break
            budget = int(fits + exceeds) // 2
    return within(0) if best is None else best


def nearest_widths(bits_T: Tensor, widths: Sequence[int]) -> Tensor:
    """Round each group's bits to the nearest width allowed, int32."""
    ladder = torch.tensor(widths, dtype=bits_T.dtype, device=bits_T.device)
    return ladder[(bits_T.unsqueeze(1) - ladder).abs().argmin(1)].to(torch.int32)


@dataclass(frozen=True)
class Part:
    """Groups whose bits stay between the same limits: their stored values, and their bits, float64."""

    values: Tensor
    bits: Tensor
    low: float
    high: float

    def total(self, shift: float) -> float:
        """What they take with all their bits shifted."""
        return float(torch.dot(self.values, (self.bits + shift).clamp(self.low, self.high)))

    def histogram(self) -> "Part":
        """Many groups as a few that take the same, nearly."""
        if len(self.bits) <= _MANY_GROUPS:
            return self
        least, most = self.bits.aminmax()
        place = ((self.bits - least) * (_BINS / (most - least).clamp(min=1e-9))).long().clamp_(max=_BINS - 1)
        values = torch.bincount(place, self.values, minlength=_BINS)
        bits = torch.bincount(place, self.values * self.bits, minlength=_BINS) / values.clamp(min=1e-9)
        return Part(values[values > 0], bits[values > 0], self.low, self.high)


def parts_within_limits(groups: FlatGroups, bits_T: Tensor) -> list[Part]:
    """The groups with these bits, which move within the limits of training."""
    values_T, bits_T = groups.values_T.cpu().double(), bits_T.cpu().double()
    return [Part(each.of(values_T), each.of(bits_T), each.limits.min_bits, each.limits.max_bits) for each in groups.alike]


def common_shift(parts: Sequence[Part], payload: float) -> float:
    """The shift of all bits at which the clamped total meets ``payload``, by bisection; of many groups it looks at a fine histogram.

    Example:
        >>> part = Part(torch.ones(2).double(), torch.tensor([3.0, 5.0]).double(), 1, 8)
        >>> round(common_shift([part], 6), 6)
        -1.0
    """
    parts = [part.histogram() for part in parts]
    left = min(part.low - float(part.bits.max()) for part in parts)
    right = max(part.high - float(part.bits.min()) for part in parts)
    for _ in range(50):
        middle = (left + right) / 2
        left, right = (middle, right) if sum(part.total(middle) for part in parts) < payload else (left, middle)
    return left


def _largest_remainder(groups: FlatGroups, bits: Tensor, values: Tensor, payload: float) -> Tensor:
    """The allowed width below each group's bits, then one width up by falling share of the way, while the payload holds it."""
    width = groups.by_limits(lambda own, limits: _on_ladder(own, limits.widths, -1), bits)
    above = groups.by_limits(lambda own, limits: _on_ladder(own, limits.widths, 0), width)
    bits = torch.minimum(torch.maximum(bits, width), above)
    order = torch.argsort((bits - width) / (above - width).clamp(min=1), descending=True, stable=True)
    return fill_up(width, above, values, order, payload - float(torch.dot(values, width)))


def fill_up(width: Tensor, above: Tensor, values: Tensor, order: Tensor, room: float) -> Tensor:
    """``width``, or ``above`` in its place for groups in this order while ``room`` bits hold it: ``values * (above - width)`` each."""
    cost = values * (above - width)
    order = order[cost[order] > 0]
    taken = torch.cumsum(cost[order], 0) <= room
    width = width.clone()
    width[order[taken]] = above[order[taken]]
    room -= float(cost[order[taken]].sum())
    rest = order[~taken][:_LAST_GROUPS]
    for group, needed in zip(rest.tolist(), cost[rest].tolist(), strict=True):  # the first that did not fit may hide smaller ones that do
        if needed <= room:
            width[group] = above[group]
            room -= needed
    return width


def _on_ladder(bits: Tensor, widths: Sequence[int], places: int) -> Tensor:
    """The first allowed width above each group's bits, or so many places further, within the ladder."""
    ladder = torch.tensor(widths, dtype=bits.dtype)
    return ladder[(torch.bucketize(bits, ladder, right=True) + places).clamp(0, len(widths) - 1)]
