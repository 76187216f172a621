"""The C steps of LC quantization: the nearest weights that a codebook can hold (Carreira-Perpiñán and Idelbayev, arXiv:1707.04319).

Each kind of codebook is a function of the weights alone (and of the codebook before, where it is warm started) that solves
``min over codebook, codes of ||w - codebook[codes]||^2``.

Shape legend: N weights, K entries of the codebook, rising.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from diffq_fx.functional.clustering import levels, nearest
from diffq_fx.functional.precision import widened

CodebookKind = Literal["adaptive", "binary", "scaled_binary", "ternary", "scaled_ternary", "powers_of_two"]
KINDS: tuple[CodebookKind, ...] = ("adaptive", "binary", "scaled_binary", "ternary", "scaled_ternary", "powers_of_two")

_SCALES = 24


def adaptive(values_N: Tensor, entries: int, start: Tensor | None = None) -> Tensor:
    """K free entries: k-means in one dimension, warm started from the codebook before."""
    return levels(values_N, entries, start)


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


def powers_of_two(smallest: int, device: torch.device | None = None) -> Tensor:
    """``{0, +-1, +-1/2, ..., +-2^-C}``.

    Example:
        >>> powers_of_two(1)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    """
    positive = torch.exp2(-torch.arange(smallest, -1, -1, dtype=torch.float32, device=device))
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def scaled(values_N: Tensor, entries: Sequence[float], start: Tensor | None = None) -> Tensor:
    """A given codebook times a scale that is learned: nearest entries and ``a = sum(w t) / sum(t^2)`` in turn, from many starts.

    Args:
        values_N: weights, shape (N,).
        entries: the codebook before scaling, K distinct numbers.
        start: the scaled codebook before; tried as well.

    Returns:
        Rising, shape (K,); the scale is positive.

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


def fit(
    values_N: Tensor, kind: CodebookKind | Sequence[float], *, entries: int, smallest: int, learn_scale: bool, start: Tensor | None
) -> Tensor:
    """The best codebook of a kind for some weights.

    Args:
        values_N: weights, shape (N,).
        kind: a name, or the entries of a codebook of one's own.
        entries: K of an "adaptive" codebook.
        smallest: C of "powers_of_two".
        learn_scale: whether a codebook of one's own is scaled.
        start: the codebook before, for a warm start; None for a cold one.

    Returns:
        Rising, float32 or better, shape (K,).

    Example:
        >>> fit(torch.tensor([0.3, -0.2]), "binary", entries=2, smallest=0, learn_scale=False, start=None)
        tensor([-1.,  1.])
    """
    fixed = {"binary": [-1.0, 1.0], "ternary": [-1.0, 0.0, 1.0]}
    if kind == "adaptive":
        return adaptive(values_N, entries, start)
    if kind == "scaled_binary":
        return scaled_binary(values_N)
    if kind == "scaled_ternary":
        return scaled_ternary(values_N)
    if kind == "powers_of_two":
        return powers_of_two(smallest, values_N.device).to(_entry_dtype(values_N))
    if not isinstance(kind, str) and learn_scale:
        return scaled(values_N, kind, start)
    own = fixed[kind] if isinstance(kind, str) else sorted(kind)
    return torch.tensor(own, dtype=_entry_dtype(values_N), device=values_N.device)


def _entry_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
