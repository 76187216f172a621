"""The bits of a model at one moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.budget.flat_groups import FlatGroups, WidthLimits

GAIN = 10.0
"""How much faster the bits move than a weight under the same optimizer; the paper has 1 and an optimizer of their own."""


@dataclass(frozen=True)
class BitState:
    """The trainable logits of all weights, and what is needed to read them: ``b = b_min + sigmoid(gain l) (b_max - b_min)``."""

    groups: FlatGroups
    """The groups of each weight, what they store and between which widths their bits move."""
    logits: Sequence[Tensor]
    """One tensor for each weight."""

    def settings(self, limits: WidthLimits) -> dict[str, Any]:
        """What the kernels have to know to read the logits of weights with these limits."""
        return {"min_bits": limits.min_bits, "max_bits": limits.max_bits, "gain": GAIN}

    def bits_T(self) -> Tensor:
        """Bits of every group, fractional, shape (T,)."""
        logits_T = torch.cat([logits.detach().reshape(-1) for logits in self.logits])
        return self.groups.by_limits(lambda own, to: functional.bits_from_logits(own, to.min_bits, to.max_bits, GAIN), logits_T)

    @torch.no_grad()
    def set_bits(self, bits_T: Tensor) -> None:
        """Write the logits of these bits, where they say others; of bits at a limit those a little within it."""
        logits_T = self.groups.by_limits(lambda own, to: functional.logits_from_bits(own, to.min_bits, to.max_bits, GAIN), bits_T)
        for logits, new in zip(self.logits, self.groups.split(logits_T), strict=True):
            if not torch.equal(logits.reshape(-1), new):
                logits.copy_(new.view_as(logits))
