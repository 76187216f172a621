"""The C steps of LC quantization: the nearest weights that a codebook can hold (Carreira-Perpiñán and Idelbayev, arXiv:1707.04319).

Each kind of codebook is a function of the weights alone (and of the codebook before, where it is warm started) that solves
``min over codebook, codes of ||w - codebook[codes]||^2``.

Shape legend: N weights, K entries of the codebook, rising.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffq_fx.functional.clustering import nearest
from diffq_fx.functional.precision import widened

_SCALES = 24


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
    """A given codebook times a scale that is learned: nearest entries and ``a = sum(w t) / sum(t^2)`` in turn, from many starts.

    The scale is positive. ``start``, the scaled codebook before, is tried as well.

    Example:
        >>> scaled(torch.tensor([1.0, 1.0, -2.0]), (-2.0, -1.0, 1.0, 2.0))
        tensor([-2., -1.,  1.,  2.])
    """
    values = widened(values_N)
    base = torch.tensor(sorted(entries), dtype=values.dtype, device=values.device)
    largest = values.abs().max() / base.abs().max()
    if not float(largest) > 0:
        return base.to(_entry_dtype(values_N))
    scales = list((largest * torch.logspace(-2, 0.3, _SCALES, dtype=values.dtype, device=values.device)).unbind())
    if start is not None:
        scales.append((widened(start).abs().max() / base.abs().max()).clamp(min=torch.finfo(values.dtype).tiny))
    best_error, best = torch.inf, base * largest
    for scale in scales:
        error, found = _refined_scale(values, base, scale)
        if error < best_error:
            best_error, best = error, base * found
    return best.to(_entry_dtype(values_N))


def _refined_scale(values: Tensor, base: Tensor, scale: Tensor) -> tuple[float, Tensor]:
    for _ in range(50):
        picked = base[nearest(values, base * scale)]
        better = torch.dot(values, picked) / picked.square().sum().clamp(min=1e-300)
        if not float(better) > 0 or torch.equal(better, scale):
            break
        scale = better
    chosen = (base * scale)[nearest(values, base * scale)]
    return float((values - chosen).square().sum()), scale


def _entry_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
