"""How long the code of the weights will be, under a density fitted to each range, as a differentiable function of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from diffq_fx.functional.groups import to_rows
from diffq_fx.weights import WeightSpec

_WIDEST_STEP = 40.0
"""Steps over spread from which on all levels are the same, and the code is empty."""


def expected_code_length(weights: Iterable[tuple[WeightSpec, Tensor, Tensor]]) -> Tensor:
    """Bits of the levels under a Laplace density fitted to each range: ``sum_s n_s H(step_s / mean|w - mean w|)``.

    The learned compression of Ballé et al. and Oktay et al. (arXiv:1906.06624), where training makes the code shorter.

    Differs from the paper: the density has one parameter and is fitted, not learned; the steps are taken as given here, since
    :func:`~diffq_fx.budget.size.expected_bits` has the part of the bits. Each weight is given by its spec, its values and the steps
    of its groups; the sum is 0-d, differentiable in the weights.
    """
    return torch.stack([_length(*each) for each in weights]).sum()


def laplace_entropy(step: Tensor) -> Tensor:
    """Bits per weight of the levels of a Laplace density, ``H = h(e^(-r/2)) + e^(-r/2) (1 + h(e^-r) / (1 - e^-r))``, h of one bit.

    ``step`` is r, steps over the mean absolute deviation, above 0. ``log2(2e / r)`` for fine steps, 0 for coarse ones.

    Example:
        >>> [round(h.item(), 2) for h in laplace_entropy(torch.tensor([0.01, 1.0, 30.0]))]
        [9.09, 2.48, 0.0]
    """
    step = step.clamp(max=_WIDEST_STEP)
    beyond_zero = torch.exp(-step / 2)  # the share of levels that are not 0; of these e^-r of each next size
    return _entropy_of_one(beyond_zero) + beyond_zero * (1 + _entropy_of_one(torch.exp(-step)) / -torch.expm1(-step))


def _entropy_of_one(share: Tensor) -> Tensor:
    return -(torch.special.xlogy(share, share) + torch.special.xlog1py(1 - share, -share)) / math.log(2)


def _length(spec: WeightSpec, weight: Tensor, step: Tensor) -> Tensor:
    ranges, rows_OI = spec.range_layout, to_rows(weight, spec.axis).float()
    counts = ranges.counts_on(rows_OI.device)
    mean = ranges.sum(rows_OI.detach()) / counts
    spread = ranges.sum((rows_OI - ranges.expand(mean)).abs()) / counts
    step = step.detach()
    varied = (spread > step / _WIDEST_STEP).expand_as(step)  # the others take no bits, and no gradient
    length = laplace_entropy(torch.where(varied, step / torch.where(varied, spread, 1), _WIDEST_STEP))
    return (length * spec.scale_layout.counts_on(length.device)).sum()
