"""The C steps of LC quantization: the nearest weights that a codebook can hold (Carreira-Perpiñán and Idelbayev, arXiv:1707.04319).

Each kind of codebook is a function of the weights alone (and of the codebook before, where it is warm started) that solves
``min over codebook, codes of ||w - codebook[codes]||^2``.

Shape legend: N weights, K entries of the codebook, rising.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffq_fx.functional.precision import widened

_STARTS, _TURNS = 2048, 20
"""Scales from which a codebook of one's own is fitted, and how often entries and scale take turns."""


def scaled_binary(values_N: Tensor) -> Tensor:
    """``{-a, +a}``, exactly: ``a = mean |w|``.

    Example:
        >>> scaled_binary(torch.tensor([1.0, -3.0]))
        tensor([-2.,  2.])
    """
    scale = widened(values_N).abs().mean().to(_entry_dtype(values_N))
    return torch.stack([-scale, scale])


def scaled_ternary(values_N: Tensor) -> Tensor:
    """``{-a, 0, +a}``, exactly: of the weights by falling size the first j, ``j = argmax sum_{i <= j} |w_i| / sqrt(j)``; a is their mean.

    Example:
        >>> scaled_ternary(torch.tensor([2.0, -2.0, 0.1]))
        tensor([-2.,  0.,  2.])
    """
    sums = widened(values_N).abs().sort(descending=True).values.cumsum(0)
    count = torch.arange(1, len(sums) + 1, dtype=sums.dtype, device=sums.device)
    best = (sums / count.sqrt()).argmax()
    scale = (sums[best] / count[best]).to(_entry_dtype(values_N))
    return torch.stack([-scale, torch.zeros_like(scale), scale])


def powers_of_two(smallest: int) -> tuple[float, ...]:
    """``{0, +-1, +-1/2, ..., +-2^-C}``, rising.

    Example:
        >>> powers_of_two(1)
        (-1.0, -0.5, 0.0, 0.5, 1.0)
    """
    positive = [2.0**-power for power in range(smallest + 1)]
    return (*(-each for each in positive), 0.0, *reversed(positive))


def scaled(values_N: Tensor, entries: Sequence[float], start: Tensor | None = None) -> Tensor:
    """A given codebook times a scale that is learned: nearest entries and ``a = sum(w t) / sum(t^2)`` in turn, from many starts at once.

    The scale is positive. ``start``, the scaled codebook before, is tried as well. One sort, then ``O(K log N)`` a start and iteration.

    Example:
        >>> scaled(torch.tensor([1.0, 1.0, -2.0]), (-2.0, -1.0, 1.0, 2.0))
        tensor([-2., -1.,  1.,  2.])
    """
    values = widened(values_N).sort().values
    base = torch.tensor(sorted(entries), dtype=values.dtype, device=values.device)
    largest = values.abs().max() / base.abs().max()
    if not float(largest) > 0:
        return base.to(_entry_dtype(values_N))
    scales_S = largest * torch.logspace(-2, 0.3, _STARTS, dtype=values.dtype, device=values.device)
    if start is not None:
        before = (widened(start).abs().max() / base.abs().max()).clamp(min=torch.finfo(values.dtype).tiny)
        scales_S = torch.cat([scales_S, before.reshape(1)])
    sums, middles = torch.cat([values.new_zeros(1), values.cumsum(0)]), (base[1:] + base[:-1]) / 2

    def products(scales_S: Tensor) -> tuple[Tensor, Tensor]:
        """``sum(w t)`` and ``sum(t^2)`` for the entries t that are nearest at each scale."""
        bounds_SK = F.pad(torch.searchsorted(values, scales_S[:, None] * middles), (1, 0))
        bounds_SK = F.pad(bounds_SK, (0, 1), value=len(values))
        return sums[bounds_SK].diff() @ base, bounds_SK.diff().to(base.dtype) @ base.square()

    for _ in range(_TURNS):
        product_S, square_S = products(scales_S)
        scales_S = torch.where(product_S > 0, product_S / square_S.clamp(min=1e-300), scales_S)
    product_S, square_S = products(scales_S)
    return (base * scales_S[(scales_S.square() * square_S - 2 * scales_S * product_S).argmin()]).to(_entry_dtype(values_N))


def _entry_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
