"""How large the compressed model is: the differentiable size that training presses on, and the exact one.

What counts as size is one abstraction, :class:`SizeMeasure`. :class:`BitPackedSize` is the paper's: every group at exactly its
width, plus the ranges and the coding of the widths.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffq_fx.weights import WeightSpec

MIB_BITS = 8 * 2**20
"""Bits in one MiB."""

_WIDTH_HEADER_BITS = 8
"""Smallest and largest width of a weight, 4 bits each; the widths are coded relative to them."""


def bit_costs(spec: WeightSpec) -> tuple[Tensor, int]:
    """What one weight stores: values per group that take the group's width, and bits that no width changes.

    A symmetric range is one float32 (its scale), an affine one a float32 scale and a zero point of the group's width. Where a
    range holds groups of several widths, or has a float offset, both of its ends are stored.

    Args:
        spec: the weight.

    Returns:
        Values per group, int64, shape of the spec's ``bits_layout``; and the fixed number of bits.

    Example:
        >>> values, fixed = bit_costs(WeightSpec(name="w", shape=(2, 8), axis=0))
        >>> values.tolist(), fixed
        ([[9], [9]], 72)
    """
    values, ranges = spec.bits_layout.counts(), spec.range_layout
    if spec.grid == "symmetric":
        return values, 32 * ranges.num_groups + _WIDTH_HEADER_BITS
    several_widths_in_a_range = spec.bits_layout.num_groups > ranges.num_groups
    if spec.grid == "float" or several_widths_in_a_range:
        return values, 64 * ranges.num_groups + _WIDTH_HEADER_BITS
    return values + ranges.num_groups // spec.bits_layout.num_groups, 32 * ranges.num_groups + _WIDTH_HEADER_BITS


class FlatGroups:
    """The groups of all weights of a model in one row, so that size costs a few kernels and not a few per weight.

    Shape legend: T groups in all, W weights.
    """

    def __init__(self, specs: Sequence[WeightSpec], device: torch.device) -> None:
        costs = [bit_costs(spec) for spec in specs]
        counts = [values.numel() for values, _ in costs]
        self.counts = counts
        self.values_T = torch.cat([values.reshape(-1) for values, _ in costs]).to(device, torch.float32)
        self.weight_of_T = torch.repeat_interleave(torch.arange(len(specs)), torch.tensor(counts)).to(device)
        self.groups_W = torch.tensor(counts, dtype=torch.float32, device=device)
        self.num_groups = sum(counts)
        self.fixed_bits = sum(fixed for _, fixed in costs)
        self.num_weights = sum(spec.numel for spec in specs)

    def coding_bits(self, width_T: Tensor) -> Tensor:
        """Bits that code the widths: ``groups * ceil(log2(1 + max - min))`` per weight, summed; 0-d, no device sync."""
        low_W, high_W = self._smallest_and_largest(width_T.float())
        return (self.groups_W * torch.ceil(torch.log2(1 + high_W - low_W))).sum()

    def _smallest_and_largest(self, width_T: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest width of each weight: many small weights in one kernel, few large ones at the speed of memory."""
        if self.num_groups > _FEW_LARGE * len(self.counts):
            pairs = [torch.aminmax(part) for part in self.split(width_T)]
            return torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs])
        empty = torch.zeros_like(self.groups_W)
        low_W = empty.scatter_reduce(0, self.weight_of_T, width_T, "amin", include_self=False)
        return low_W, empty.scatter_reduce(0, self.weight_of_T, width_T, "amax", include_self=False)

    def split(self, flat_T: Tensor) -> list[Tensor]:
        """One flat tensor per weight."""
        return list(flat_T.split(self.counts))


class SizeMeasure(ABC):
    """An answer to "how many bits do the quantized weights take?"."""

    @abstractmethod
    def expected_bits(self, groups: FlatGroups, bits_T: Tensor) -> Tensor:
        """Size in bits for fractional widths, 0-d, differentiable in ``bits_T``, without a device sync."""

    @abstractmethod
    def exact_bits(self, groups: FlatGroups, width_T: Tensor) -> int:
        """Size in bits for whole widths."""


class BitPackedSize(SizeMeasure):
    """Every value at exactly its group's width: ``M(b) = sum_s n_s b_s``, DiffQ (arXiv:2104.09987), plus ranges and coded widths.

    Differs from the paper: the widths of a weight are coded relative to its smallest one, and a zero point costs its group's width.
    """

    def expected_bits(self, groups: FlatGroups, bits_T: Tensor) -> Tensor:
        """``sum_s n_s b_s`` plus what ranges and the coding of the rounded widths take."""
        with torch.no_grad():
            overhead = groups.coding_bits(bits_T.round()) + groups.fixed_bits
        return torch.dot(groups.values_T, bits_T) + overhead

    def exact_bits(self, groups: FlatGroups, width_T: Tensor) -> int:
        """The same for whole widths, in exact arithmetic."""
        payload = (groups.values_T.double() * width_T.double()).sum()
        return round(payload.item()) + round(groups.coding_bits(width_T).item()) + groups.fixed_bits


_FEW_LARGE = 4096
"""Groups per weight from which on a kernel for each weight beats a scatter over all groups."""
_PAYLOAD_ROUNDS = 20
_CLOSE_ENOUGH = 1e-3
_LAST_GROUPS = 4096


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
        shifted = bits + _common_shift(values, bits, payload, widths[0], widths[-1])
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


def _common_shift(values: Tensor, bits: Tensor, payload: float, low: int, high: int) -> float:
    """The shift of all bits at which the clamped total meets ``payload``, by bisection."""
    left, right = float(low - high), float(high - low)
    for _ in range(40):
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


def mib(bits: float) -> float:
    """Bits to MiB.

    Example:
        >>> mib(8 * 2**20)
        1.0
    """
    return bits / MIB_BITS
