"""Where the bits should go, from what the first steps of training tell: they would take long to find it by gradient steps alone.

At small noise the loss grows by half the curvature H of a weight times the variance of its noise. A group of n weights with range R and
b bits then adds ``n H R^2 4^-b`` to the loss and ``n b`` to the size. Under a target the least loss has the same slope in every group:
``b = log2(R sqrt(H)) + c``. The curvature shows in the gradient: under noise of b0 bits, the same in all groups, a weight is off by
about ``R 2^-b0``, and its gradient by H times that. With F the mean square of the gradient, H is in proportion to ``sqrt(F) / R``, so
that ``b = log2(R sqrt(F)) / 2 + c``.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.functional.groups import to_rows
from diffq_fx.training.allocation import Part, common_shift

if TYPE_CHECKING:
    from diffq_fx.training.compression import Compression

_STEPS_OF_DOUBT = 2.0
"""What is known of the whole weight counts for a group as much as this many steps with a gradient of its own: of the rows of an
embedding most have had none yet, and they are not worthless."""
_INSIDE = 0.05
"""Bits that stay between a group and the limits, where its gradient would vanish."""


class Sensitivity:
    """The mean square of the gradient of each group over the first optimizer steps, and the bits that it asks for."""

    def __init__(self, compression: "Compression") -> None:
        self.compression = compression
        self.steps = 0
        self.squares: list[Tensor] = []
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of the weights as the optimizer is about to use them."""
        last, compression = self.compression.config.sensitivity_step, self.compression
        if last is None or int(compression.progress[0]) >= last:
            return
        self.steps += 1
        for i, quantizer in enumerate(compression.learned):
            layout, grad = quantizer.spec.bits_layout, quantizer.source[0].grad
            if len(self.squares) <= i:
                self.squares.append(torch.zeros(layout.shape, device=quantizer.logits.device))
                self.seen.append(torch.zeros(layout.shape, device=quantizer.logits.device))
            if grad is not None and not grad.is_sparse:
                square_OI = to_rows(grad, quantizer.spec.axis).float().square()
                mean = layout.sum(square_OI) / layout.counts().to(square_OI.device)
                self.squares[i] += mean.nan_to_num_(0, 0, 0)
                self.seen[i] += mean > 0

    @torch.no_grad()
    def move_bits(self, budget: int) -> bool:
        """After the last step that counts, give every group the bits it asks for, all together within the budget; whether it did."""
        compression, config = self.compression, self.compression.config
        if config.sensitivity_step is None or self.steps == 0 or compression.progress[0] + 1 != config.sensitivity_step:
            return False
        groups = compression.groups()
        asked_T = torch.cat([self._asked(i).reshape(-1) for i in range(len(self.squares))])
        self.squares, self.seen = [], []
        if not bool(torch.isfinite(asked_T).any()):
            return False  # no gradient reached any weight
        asked_T = asked_T.clamp(min=float(asked_T[torch.isfinite(asked_T)].min()))
        lowest, centred_T = min(alike.limits.min_bits for alike in groups.alike), asked_T - asked_T.mean()
        guess_T = groups.by_limits(lambda own, limits: own.clamp(limits.min_bits, limits.max_bits), centred_T + lowest)
        coding = float(groups.coding_bits(guess_T.round()))
        values_T, bits_T = groups.values_T.double().cpu(), asked_T.double().cpu()
        parts = [Part(each.of(values_T), each.of(bits_T), each.limits.min_bits, each.limits.max_bits) for each in groups.alike]
        bits_T = asked_T + common_shift(parts, budget - groups.fixed_bits - coding)
        for quantizer, bits in zip(compression.learned, groups.split(bits_T), strict=True):
            own = quantizer.config
            bits = bits.clamp(own.min_bits + _INSIDE, own.max_bits - _INSIDE)
            logits = functional.logits_from_bits(bits, own.min_bits, own.max_bits, own.bits_gain)
            quantizer.logits.copy_(logits.view_as(quantizer.logits))
        return True

    def _asked(self, index: int) -> Tensor:
        """``log2(R sqrt(F)) / 2`` of each group of a weight; minus infinity where nothing depends on it."""
        quantizer = self.compression.learned[index]
        spec, square = quantizer.spec, self.squares[index]
        counts = spec.bits_layout.counts().to(square.device)
        whole = (square * counts).sum() / counts.sum()
        square = torch.lerp(whole, square, self.seen[index] / (self.seen[index] + _STEPS_OF_DOUBT))
        span = quantizer.span_in_training(quantizer.source[0])
        if square.numel() == 1 < span.numel():  # one width over many ranges: their noise adds up
            span = span.square().mean().sqrt()
        return torch.log2(span.expand_as(square) * square.sqrt()) / 2
