"""Levels by their error and the length of their code: rounding for an entropy-coded size (CERWU, arXiv:2505.18758)."""

import math

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.budget.entropy import RoundedWeight, level_counts, symbols
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import GroupLayout, rows_of

PRICE = math.log(2) / 6
"""Squared steps that a bit is worth: steps of size d cost d^2 / 12, and take a bit more when they are half as long."""
_ROUNDS = 2
"""In which the code and the levels are fitted to each other."""


class CodedLevels:
    """The code of a weight's levels, one model for each width, and the choice between neighbouring levels.

    Args:
        weight: what it is fitted to.
        price: squared steps that a bit is worth.
    """

    def __init__(self, weight: RoundedWeight, price: float) -> None:
        self.price = price
        self._fit(weight)
        for _ in range(_ROUNDS):
            self._fit(self.cheapest(weight))

    def _fit(self, weight: RoundedWeight) -> None:
        counts = level_counts(weight)
        self.largest = len(counts) - 1
        self.lengths = -torch.log2((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)).float().reshape(-1)

    def cheapest(self, weight: RoundedWeight) -> RoundedWeight:
        """The weight on its levels, chosen one by one; but for the ends of the ranges, which stay: the grid follows them."""
        layout, rows_OI = weight.spec.scale_layout, torch.empty_like(weight.rows)
        for part in layout.row_slices(rows_OI.device):
            width = rows_of(weight.width, part)
            rows_OI[part] = self.choose(weight.rows[part], weight.params.of_rows(part), width, layout.of_rows(part))
        return weight._replace(rows=torch.where(weight.spec.range_layout.at_ends(weight.rows), weight.rows, rows_OI))

    def choose(self, values: Tensor, params: QuantParams, width: Tensor, layout: GroupLayout, worth: Tensor | float = 1.0) -> Tensor:
        """The nearest level of each value or one of its two neighbours: the least ``worth ((w - q) / step)^2 + price * length(q)``."""
        values = values.to(params.scale.dtype)
        near, scale = functional.quantize(values, params, width, layout), layout.expand(params.scale)
        top = layout.expand((2 ** width.to(torch.int32) - 1).expand_as(params.scale))
        chosen = least = torch.empty(0)
        for shift in (0, -1, 1):
            levels = torch.minimum((near + shift).clamp_(min=0), top)
            rounded = functional.dequantize(levels, params, layout)
            cost = worth * ((values - rounded) / scale).square()
            cost += self.price * self.lengths[symbols(levels, params, width, layout, self.largest)]
            chosen, least = (rounded, cost) if not shift else (torch.where(cost < least, rounded, chosen), torch.minimum(cost, least))
        return chosen
