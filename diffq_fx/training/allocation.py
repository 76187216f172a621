"""Rounding the trained bits of all groups to whole widths, so that the exact size meets a budget."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffq_fx.training.groups_in_row import FlatGroups
from diffq_fx.training.size import SizeMeasure

_PAYLOAD_ROUNDS = 20
_CLOSE_ENOUGH = 1e-3
_LAST_GROUPS = 4096
_MANY_GROUPS = 1 << 17
_BINS = 1 << 14


def allocate_widths(groups: FlatGroups, bits_T: Tensor, widths: Sequence[int], budget_bits: int, measure: SizeMeasure) -> Tensor:
    """Round the bits of all groups so that the exact size comes as close to a budget as it can without exceeding it.

    Every group gets the allowed width below its bits; the budget's remainder goes, one allowed width up each, to the groups that are
    furthest on the way there. Where the trained bits are off the budget they are first shifted together until they meet it.

    Args:
        groups: the model's groups.
        bits_T: trained bits, fractional.
        widths: the widths allowed, rising.
        budget_bits: size that must not be exceeded, where the widths allow.
        measure: what counts as size.

    Returns:
        int32, shape (T,).
    """
    bits = bits_T.double().cpu()
    values = groups.values_T.double().cpu()
    coding = float(groups.coding_bits(bits_T.round()))
    # What the coding of the widths takes depends on the widths: search the payload that leaves just enough for it.
    most = budget_bits - groups.fixed_bits
    least = most - groups.num_groups * math.ceil(math.log2(1 + widths[-1] - widths[0]))
    payload, best = most - coding, torch.full_like(bits, widths[0])
    for _ in range(_PAYLOAD_ROUNDS):
        shifted = bits + common_shift(values, bits, payload, widths[0], widths[-1])
        width = _largest_remainder(shifted.clamp(widths[0], widths[-1]), values, payload, widths)
        exact = measure.exact_bits(groups, width.to(bits_T.device))
        if exact <= budget_bits:
            least, best = payload, width
        else:
            most = payload
        if 0 <= budget_bits - exact <= _CLOSE_ENOUGH * budget_bits:
            break
        payload = (least + most) / 2
    return best.to(bits_T.device, torch.int32)


def nearest_widths(bits_T: Tensor, widths: Sequence[int]) -> Tensor:
    """Round each group's bits to the nearest width allowed, int32.

    Example:
        >>> nearest_widths(torch.tensor([2.4, 5.0, 7.0]), (2, 4, 8))
        tensor([2, 4, 8], dtype=torch.int32)
    """
    ladder = torch.tensor(widths, dtype=bits_T.dtype, device=bits_T.device)
    return ladder[(bits_T.unsqueeze(1) - ladder).abs().argmin(1)].to(torch.int32)


def common_shift(values: Tensor, bits: Tensor, payload: float, low: float, high: float) -> float:
    """The shift of all bits at which the clamped total meets ``payload``, by bisection; of many groups it looks at a fine histogram.

    Example:
        >>> round(common_shift(torch.ones(2).double(), torch.tensor([3.0, 5.0]).double(), 6, 1, 8), 6)
        -1.0
    """
    if len(bits) > _MANY_GROUPS:
        least, most = bits.aminmax()
        place = ((bits - least) * (_BINS / (most - least).clamp(min=1e-9))).long().clamp_(max=_BINS - 1)
        total = torch.bincount(place, values, minlength=_BINS)
        bits = torch.bincount(place, values * bits, minlength=_BINS) / total.clamp(min=1e-9)
        values, bits = total[total > 0], bits[total > 0]
    left, right = low - float(bits.max()), high - float(bits.min())
    for _ in range(50):
        middle = (left + right) / 2
        total = float(torch.dot(values, (bits + middle).clamp(low, high)))
        left, right = (middle, right) if total < payload else (left, middle)
    return left


def _largest_remainder(bits: Tensor, values: Tensor, payload: float, widths: Sequence[int]) -> Tensor:
    """The allowed width below each group's bits, then one width up by falling share of the way, while the payload holds it."""
    ladder = torch.tensor(widths, dtype=bits.dtype)
    below = (torch.bucketize(bits, ladder, right=True) - 1).clamp(min=0)
    width, above = ladder[below], ladder[(below + 1).clamp(max=len(widths) - 1)]
    cost = values * (above - width)
    room = payload - float(torch.dot(values, width))
    order = torch.argsort((bits - width) / (above - width).clamp(min=1), descending=True, stable=True)
    order = order[cost[order] > 0]
    taken = torch.cumsum(cost[order], 0) <= room
    width[order[taken]] = above[order[taken]]
    room -= float(cost[order[taken]].sum())
    for group in order[~taken][:_LAST_GROUPS].tolist():  # the first that did not fit may hide smaller ones that do
        if cost[group] <= room:
            width[group] = above[group]
            room -= float(cost[group])
    return width
