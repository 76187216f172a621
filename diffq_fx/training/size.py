"""How large the compressed model is: the differentiable size that training presses on, and the exact one.

What counts as size is one abstraction, :class:`SizeMeasure`. :class:`BitPackedSize` is the paper's: every group at exactly its
width, plus the ranges and the coding of the widths.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffq_fx.kernels import bits_of_logits, size_of_logits, slope_of_size
from diffq_fx.training.groups_in_row import FlatGroups, Segment, WidthLimits

MIB_BITS = 8 * 2**20
"""Bits in one MiB."""
_ALL = slice(None)


class SizeMeasure(ABC):
    """An answer to "how many bits do the quantized weights take?"."""

    linear: ClassVar[bool] = False
    """Whether the size is ``sum_s n_s b_s``, which is worked out without a look at each group's bits."""

    @abstractmethod
    def size_and_slope(self, values_N: Tensor, bits_N: Tensor) -> tuple[Tensor, Tensor]:
        """Size in bits of groups with ``values_N`` stored values and fractional widths, 0-d, and its derivative in each width."""

    @abstractmethod
    def exact_bits(self, groups: FlatGroups, width_T: Tensor) -> int:
        """Size in bits for whole widths, ranges and coded widths included."""


class BitPackedSize(SizeMeasure):
    """Every value at exactly its group's width: ``M(b) = sum_s n_s b_s``, DiffQ (arXiv:2104.09987), plus ranges and coded widths.

    Differs from the paper: the widths of a weight are coded relative to its smallest one, and a zero point costs its group's width.
    """

    linear = True

    def size_and_slope(self, values_N: Tensor, bits_N: Tensor) -> tuple[Tensor, Tensor]:
        """``sum_s n_s b_s`` and ``n_s``."""
        return (values_N * bits_N).sum(), values_N

    def exact_bits(self, groups: FlatGroups, width_T: Tensor) -> int:
        """The same for whole widths, in exact arithmetic."""
        payload = (groups.values_T.double() * width_T.double()).sum()
        return round(payload.item()) + round(groups.coding_bits(width_T).item()) + groups.fixed_bits


@dataclass(frozen=True)
class SizeOfLogits:
    """The size of a model as a function of the trainable logits of its bits, with its derivative in closed form.

    ``b = b_min + sigmoid(gain l) (b_max - b_min)``. Everything is worked out tile by tile and nothing is kept: at one width per weight
    each pass over memory shows.
    """

    groups: FlatGroups
    measure: SizeMeasure
    gain: float

    def __call__(self, logits: Sequence[Tensor]) -> Tensor:
        """Size in bits, 0-d, differentiable in the logits, without a device sync."""
        return _DifferentiableSize.apply(self, *logits)

    def total(self, logits: Sequence[Tensor], rows: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Size in bits, and how fast it grows when all logits grow together, both 0-d; ``rows`` are those of the segments, if at hand."""
        size = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        growth = torch.zeros_like(size)
        limits: dict[int, tuple[Tensor, Tensor]] = {}
        few_rows = []
        for i, segment in enumerate(self.groups.segments()):
            row = segment.gather(logits) if rows is None else rows[i]
            few_rows += [row] if segment.has_few else []
            if self.measure.linear:
                part, slope, low, high = size_of_logits(segment.values, row, **self._settings(segment.limits))
                limits |= {} if segment.has_few else {segment.weights[0]: (low, high)}
                size += part
                growth += slope
                continue
            for tile in segment.tiles():
                part, slope = self._size_and_slope(segment.limits, segment.values[tile], row[tile])
                size += part
                growth += slope.sum()
        few_row = torch.cat(few_rows) if len(few_rows) > 1 else next(iter(few_rows), None)
        low_W, high_W = self.groups.limits(logits, few_row, limits)
        size += self.groups.coding_bits_between(*(self._bits_of_each(limit_W).round() for limit_W in (low_W, high_W)))
        size += self.groups.fixed_bits
        return size, growth

    def slope(self, segment: Segment, row_N: Tensor, tile: slice = _ALL, times: Tensor | None = None) -> Tensor:
        """Derivative of the size, ``times`` a 0-d tensor, in a piece of a segment's row of logits."""
        if self.measure.linear:
            return slope_of_size(segment.values[tile], row_N[tile], **self._settings(segment.limits), times=times)
        slope = self._size_and_slope(segment.limits, segment.values[tile], row_N[tile])[1]
        return slope if times is None else slope.mul_(times)

    def _settings(self, limits: WidthLimits) -> dict[str, float]:
        return {"min_bits": limits.min_bits, "max_bits": limits.max_bits, "gain": self.gain}

    def _bits_of_each(self, logits_W: Tensor) -> Tensor:
        """The bits of one logit of each weight."""
        alike = self.groups.alike
        if len(alike) == 1:
            return bits_of_logits(logits_W, **self._settings(alike[0].limits))[0]
        bits_W = torch.empty_like(logits_W)
        for each in alike:
            bits_W[each.index] = bits_of_logits(logits_W[each.index], **self._settings(each.limits))[0]
        return bits_W

    def _size_and_slope(self, limits: WidthLimits, values_N: Tensor, logits_N: Tensor) -> tuple[Tensor, Tensor]:
        bits, slope = bits_of_logits(logits_N, **self._settings(limits))
        size, slope_of_bits = self.measure.size_and_slope(values_N, bits)
        return size, slope.mul_(slope_of_bits)


class _DifferentiableSize(torch.autograd.Function):
    """:meth:`SizeOfLogits.total` with the gradient of :meth:`SizeOfLogits.slope`."""

    @staticmethod
    def forward(ctx: Any, size_of: SizeOfLogits, *logits: Tensor) -> Tensor:
        ctx.size_of = size_of
        ctx.save_for_backward(*logits)
        return size_of.total(logits)[0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(logits)
        for segment in ctx.size_of.groups.segments():
            slope = ctx.size_of.slope(segment, segment.gather(logits), times=grad)
            for i, own in zip(segment.weights, segment.split(slope, logits), strict=True):
                grads[i] = own
        return None, *grads


def mib(bits: float) -> float:
    """Bits to MiB.

    Example:
        >>> mib(8 * 2**20)
        1.0
    """
    return bits / MIB_BITS
