"""How large the quantized weights are: the differentiable size that training presses on, and the exact one.

Every value takes exactly its group's width: ``M(b) = sum_s n_s b_s``, DiffQ (arXiv:2104.09987), plus ranges and coded widths.
Differs from the paper: the widths of a weight are coded relative to its smallest one, and a zero point costs its group's width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.budget.bit_state import GAIN, BitState
from diffq_fx.budget.flat_groups import FlatGroups, Segment
from diffq_fx.functional.precision import widest_float
from diffq_fx.kernels import size_of_logits, slope_of_size

MIB_BITS = 8 * 2**20
"""Bits in one MiB."""
_ALL = slice(None)


def exact_bits(groups: FlatGroups, width_T: Tensor) -> int:
    """Size in bits for whole widths, shape (T,), in exact arithmetic."""
    payload = torch.dot(groups.values_T.cpu().double(), width_T.cpu().double())
    return round(payload.item()) + round(groups.coding_bits(width_T).item()) + groups.fixed_bits


def expected_bits(state: BitState) -> Tensor:
    """Size in bits for fractional bits, 0-d, differentiable in the logits, without a device sync."""
    return _ExpectedBits.apply(state, *state.logits)


def size_and_growth(state: BitState, rows: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Size in bits, and how fast it grows when all logits grow together, both 0-d, float64 where the device has it; without autograd.

    Everything is worked out tile by tile and nothing is kept: at one width per weight each pass over memory shows. ``rows`` are the logits
    of each segment, if they are at hand.
    """
    groups = state.groups
    size = torch.zeros((), dtype=widest_float(groups.device), device=groups.device)
    growth = torch.zeros_like(size)
    limits: dict[int, tuple[Tensor, Tensor]] = {}
    few_rows = []
    for i, segment in enumerate(groups.segments()):
        row = segment.gather(state.logits) if rows is None else rows[i]
        few_rows += [row] if segment.has_few else []
        part, slope, low, high = size_of_logits(segment.values, row, **state.settings(segment.limits))
        limits |= {} if segment.has_few else {segment.weights[0]: (low, high)}
        size += part
        growth += slope
    few_row = torch.cat(few_rows) if len(few_rows) > 1 else next(iter(few_rows), None)
    low_W, high_W = groups.limits(state.logits, few_row, limits)
    bits_2W = functional.bits_from_logits(torch.stack([low_W, high_W]), groups.min_bits_W, groups.max_bits_W, GAIN)
    size += groups.coding_bits_between(*bits_2W.round())
    size += groups.fixed_bits
    return size, growth


def slope(state: BitState, segment: Segment, row_N: Tensor, tile: slice = _ALL, times: Tensor | None = None) -> Tensor:
    """Derivative of the size, ``times`` a 0-d tensor, in a piece of a segment's row of logits."""
    return slope_of_size(segment.values[tile], row_N[tile], **state.settings(segment.limits), times=times)


class _ExpectedBits(torch.autograd.Function):
    """:func:`size_and_growth` with the gradient of :func:`slope`."""

    @staticmethod
    def forward(ctx: Any, state: BitState, *logits: Tensor) -> Tensor:
        ctx.state = BitState(state.groups, ())
        ctx.save_for_backward(*logits)
        return size_and_growth(state)[0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(logits)
        for segment in ctx.state.groups.segments():
            own_slope = slope(ctx.state, segment, segment.gather(logits), times=grad)
            for i, own in zip(segment.weights, segment.split(own_slope, logits), strict=True):
                grads[i] = own
        return None, *grads


def mib(bits: float) -> float:
    """Bits to MiB."""
    return bits / MIB_BITS
