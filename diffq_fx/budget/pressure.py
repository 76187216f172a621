"""The pressure on the size: what is done to the gradients of the bits before a step, and to the bits after it.

With a target, training is a constrained problem, min L(w, b) subject to M(b) = target, and is solved by projection:

- before the step, the bits' gradient ``g`` loses the part that would only change the size: ``g - lambda dM/dl`` with
  ``lambda = sum(g) / sum(dM/dl)``, the Lagrange multiplier. It has the scale of the loss whatever that is.
- after the step, all logits of the model are shifted together so that the size is what it should be.

So the size is met from the first step on, and what the optimizer learns is where the bits go. With a penalty (the paper's
lambda) ``penalty * dM/dl`` is added once per step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diffq_fx.budget.allocation import common_shift, parts_within_limits
from diffq_fx.budget.bit_state import GAIN, BitState
from diffq_fx.budget.flat_groups import FlatGroups, Segment
from diffq_fx.budget.size import size_and_growth, slope
from diffq_fx.functional.groups import tiles
from diffq_fx.kernels import moments

_GRADIENT_RMS = 1e-3
"""The bits' gradient is brought to this size, so that a plain SGD moves them as an Adam would, whatever the scale of the loss."""

_ROUNDING = 1e-6
"""What the projection leaves of a gradient below this share of it is rounding: of one group for the whole model nothing else is left."""

_LOGIT_LIMIT = 6.0
"""``|gain * logit|`` stays below this: further out the sigmoid's slope is too small for a group ever to come back."""

_LARGEST_SHIFT = 0.5
"""Largest common shift of ``gain * logit`` in one step."""

OpenRows = Sequence[tuple[Segment, Tensor, Tensor]]
"""Segments with their logits and the gradients of these, as rows."""


def same_bits(groups: FlatGroups, budget: int) -> Tensor:
    """The bits that meet a budget if all groups have the same, as far as their limits allow, shape (T,)."""
    bits = common_shift(parts_within_limits(groups, torch.zeros(groups.num_groups)), budget - groups.fixed_bits)
    bits_T = torch.full((groups.num_groups,), bits, dtype=torch.float32, device=groups.device)
    return groups.by_limits(lambda own, limits: own.clamp(limits.min_bits, limits.max_bits), bits_T)


@contextmanager
def open_rows(state: BitState, grads: Mapping[int, Tensor]) -> Iterator[OpenRows]:
    """Gradients of the logits, by the index of the weight, as rows that may be changed in place; written back at the end."""
    own = [grads.get(i, each) for i, each in enumerate(state.logits)]
    rows = [(segment, segment.gather(state.logits), segment.open(own)) for segment in state.groups.segments(tuple(grads))]
    yield rows
    for segment, _, grad in rows:
        segment.close(grad, own)


def add_penalty(state: BitState, rows: OpenRows, worth: Tensor | float) -> None:
    """Add ``worth * dM/dl`` to the gradients; ``worth`` is loss per bit of size."""
    for grad, growth in _tiles(state, rows):
        grad.add_(growth * worth)


def gradient_sums(state: BitState, rows: OpenRows, scale: Tensor | float) -> Tensor:
    """What the multiplier and the scale of these gradients are made of: the sums of g, n = dM/dl, g^2, g n, n^2 and 1, shape (6,).

    ``scale`` is what the gradients are still multiplied with: a fused optimizer divides by GradScaler's scale itself.
    """
    g, n, gg, gn, nn = torch.stack([moments(grad, growth) for grad, growth in _tiles(state, rows)]).sum(0).unbind()
    count = torch.full_like(g, sum(grad.numel() for _, _, grad in rows))
    return torch.stack([g / scale, n, gg / (scale * scale), gn / scale, nn, count])


def worth_of_a_bit(sums: Tensor) -> Tensor:
    """Loss that the last bit of size is worth, float32, 0-d: the Lagrange multiplier; ``sums`` as for :func:`project`."""
    return -(sums[0] / sums[1].clamp(min=1e-30)).float()


def project(state: BitState, rows: OpenRows, sums: Tensor, scale: Tensor | float) -> None:
    """Take the part that only changes the size out of the gradients, and bring the rest to its size, in place.

    ``sums`` are those of :func:`gradient_sums`, of all optimizers that hold bits of the model added up.
    """
    g, n, gg, gn, nn, count = sums.unbind()
    multiplier = g / n.clamp(min=1e-30)
    square = (gg - 2 * multiplier * gn + multiplier**2 * nn) / count
    square = torch.maximum(square, gg * (_ROUNDING**2 / count)).clamp(min=1e-60)
    factor = (_GRADIENT_RMS / square.sqrt()).float()
    onto = worth_of_a_bit(sums) * scale * factor
    for grad, growth in _tiles(state, rows):
        grad.mul_(factor).addcmul_(growth, onto)


def _tiles(state: BitState, rows: OpenRows) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of the gradients, and the derivative of the size in the same logits."""
    for segment, row, grad in rows:
        for tile in tiles(row.shape, row.device):
            yield grad[tile], slope(state, segment, row, tile)


def shift_to(state: BitState, budget: int) -> None:
    """Shift all logits together so that the size is the one to hold."""
    segments = state.groups.segments()
    rows = [segment.open(state.logits) for segment in segments]
    size, growth = size_and_growth(state, rows)
    shift = ((budget - size) / growth.clamp(min=1e-6)).clamp(-_LARGEST_SHIFT / GAIN, _LARGEST_SHIFT / GAIN)
    for segment, row in zip(segments, rows, strict=True):
        for tile in tiles(row.shape, row.device):
            row[tile].add_(shift).clamp_(-_LOGIT_LIMIT / GAIN, _LOGIT_LIMIT / GAIN)
        segment.close(row, state.logits)
