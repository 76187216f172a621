"""Where the bits should go, from what the first steps of training tell: they would take long to find it by gradient steps alone.

At small noise the loss grows by half the curvature H of a weight times the variance of its noise. A group of n weights with range R and
b bits then adds ``n H R^2 4^-b`` to the loss and ``n b`` to the size. Under a target the least loss has the same slope in every group:
``b = log2(R sqrt(H)) + c``. The curvature shows in the gradient: under noise of b0 bits, the same in all groups, a weight is off by
about ``R 2^-b0``, and its gradient by H times that. With F the mean square of the gradient, H is in proportion to ``sqrt(F) / R``, so
that ``b = log2(R sqrt(F)) / 2 + c``.
"""

import torch
from torch import Tensor

from diffq_fx.budget.allocation import common_shift, parts_within_limits
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.functional.groups import to_rows
from diffq_fx.weights import WeightSpec

_STEPS_OF_DOUBT = 2.0
"""What is known of the whole weight counts for a group as much as this many steps with a gradient of its own: of the rows of an
embedding most have had none yet, and they are not worthless."""
_INSIDE = 0.05
"""Bits that stay between a group and the limits, where its gradient would vanish."""


def observe(spec: WeightSpec, grad: Tensor | None, sums: Tensor) -> None:
    """Add the mean square of each group's gradient to ``sums[0]``, shape (R, C), and one to ``sums[1]`` where it is not zero.

    ``sums[2]`` is for the gradients of the logits, ``sums[3]`` for the squared noise at which they were seen: see
    :func:`measure_curvature`.
    """
    if grad is None or grad.is_sparse:
        return
    layout = spec.bits_layout
    square_OI = to_rows(grad.detach(), spec.axis).float().square()
    mean = layout.sum(square_OI) / layout.counts_on(square_OI.device)
    sums[0] += mean.nan_to_num(0, 0)
    sums[1] += mean > 0


def asked_bits(spec: WeightSpec, sums: Tensor, span: Tensor) -> Tensor:
    """The bits that the groups of a weight ask for, but for a constant: ``log2(R sqrt(F)) / 2``; -inf where nothing depends on a group.

    ``sums`` is from :func:`observe`, ``span`` the length of the range of each group.
    """
    square = without_doubt(spec, sums)
    shared = [axis for axis, ranges in enumerate(span.shape) if square.shape[axis] == 1 < ranges]
    if shared:  # one width over many ranges: their noise adds up
        span = span.square().mean(shared, keepdim=True).sqrt()
    return torch.log2(span.expand_as(square) * square.sqrt()) / 2


def without_doubt(spec: WeightSpec, sums: Tensor) -> Tensor:
    """F of each group, with what is known of the whole weight."""
    square, seen = sums[:2]
    counts = spec.bits_layout.counts(square.device)
    return torch.lerp((square * counts).sum() / counts.sum(), square, seen / (seen + _STEPS_OF_DOUBT))


def measure_curvature(sums: Tensor, noise: Tensor, growth: Tensor) -> None:
    """Make the curvature of each group of the gradients of its logits, in place: noise of the square E adds ``H E / 2`` to the loss.

    So ``H = 2 (dL/dl) / (dE/dl)``, without bias: F says where the curvature is large, this says how large. ``sums[2]`` are the summed
    gradients of the logits, ``dL/dl``, ``noise`` is E of each group at these steps, ``growth`` dE/dl.
    """
    sums[2] = (2 * sums[2] / growth).nan_to_num(0, 0, 0)
    sums[3] = noise


def measured_curvature(sums: Tensor) -> tuple[Tensor, Tensor]:
    """H of each group from :func:`measure_curvature`, without bias but noisy, and its variance, ``F / E``; both 0 before that."""
    was_measured = sums[3] > 0
    return torch.where(was_measured, sums[2], 0), torch.where(was_measured, sums[0] / sums[3], 0)


def asked_on_average(spec: WeightSpec, sums: Tensor) -> float | None:
    """The bits that a whole weight asks for, but for a constant, from what :func:`measure_curvature` has left; None before that.

    R is in proportion to the root mean square of the noise, since all groups had the same bits.
    """
    counts = spec.bits_layout.counts(sums.device)
    square = without_doubt(spec, sums) * sums[3] / counts
    known = square > 0
    if not bool(known.any()):
        return None
    counts = counts.expand_as(square)[known]
    return float((torch.log2(square[known]) * counts).sum() / counts.sum()) / 4


def bits_within(groups: FlatGroups, asked_T: Tensor, budget: int) -> Tensor | None:
    """The bits that all groups ask for, shifted together so that they take a budget; None where no group asks for any, shape (T,)."""
    if not bool(torch.isfinite(asked_T).any()):
        return None
    asked_T = _of_sets(groups, asked_T.clamp(min=float(asked_T[torch.isfinite(asked_T)].min())))
    lowest, centred_T = min(alike.limits.min_bits for alike in groups.alike), asked_T - asked_T.mean()
    guess_T = groups.by_limits(lambda own, limits: own.clamp(limits.min_bits, limits.max_bits), centred_T + lowest)
    coding = float(groups.coding_bits(guess_T.round()))
    bits_T = asked_T + common_shift(parts_within_limits(groups, asked_T), budget - groups.fixed_bits - coding)
    return groups.by_limits(lambda own, limits: own.clamp(limits.min_bits + _INSIDE, limits.max_bits - _INSIDE), bits_T)


def _of_sets(groups: FlatGroups, asked_T: Tensor) -> Tensor:
    """The bits that weights with one width ask for together: the loss adds up, so ``4^b`` is the mean of theirs."""
    if not groups.in_sets:
        return asked_T
    values, worth = groups.values_T.cpu().double(), torch.exp2(2 * asked_T.cpu().double())
    together = groups.as_firsts(groups.at_firsts(values * worth) / groups.at_firsts(values).clamp(min=1)).log2() / 2
    return together.to(asked_T.device, asked_T.dtype)
