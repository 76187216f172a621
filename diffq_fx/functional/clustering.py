"""k-means, in one dimension (exact, or fast from a good start) and of vectors; deterministic, on any device.

Shape legend: N points, D their dimension, K centres.
"""

import torch
from torch import Tensor

from diffq_fx.functional.precision import widened, widest_float

_COARSE = 512
"""Runs of sorted values that stand for all of them where the fast method looks for its start."""
_CHUNK = 1 << 22
"""Distances that are held at once."""


def optimal_levels(values_N: Tensor, entries: int, counts_N: Tensor | None = None) -> Tensor:
    """Centres with the smallest squared error there is, by dynamic programming over the sorted values: ``O(K N^2)``.

    For ``entries`` = K of at most N centres, rising, float64. ``counts_N`` says how often each value counts; None for once.

    Example:
        >>> optimal_levels(torch.tensor([0.0, 10.0, 1.0, 11.0]), 2)
        tensor([ 0.5000, 10.5000], dtype=torch.float64)
    """
    middle = widened(values_N).mean()  # far from zero the squares would cancel
    values, order = (widened(values_N) - middle).sort()
    counts = torch.ones_like(values) if counts_N is None else widened(counts_N)[order]
    zero = values.new_zeros(1)
    total, first, second = (torch.cat([zero, (counts * values**power).cumsum(0)]) for power in range(3))
    # cost[i, j]: squared error of values i..j-1 around their mean; infinite where there are none.
    weight, moment = total - total.unsqueeze(1), first - first.unsqueeze(1)
    cost = (second - second.unsqueeze(1)) - moment.square() / weight.clamp(min=1e-300)
    cost = torch.where(weight > 0, cost.clamp(min=0), torch.inf)
    best, cuts = cost[0], []
    for _ in range(entries - 1):
        best, cut = (best.unsqueeze(1) + cost).min(0)
        cuts.append(cut)
    bounds = [len(values)]
    for cut in reversed(cuts):
        bounds.append(int(cut[bounds[-1]]))
    bounds = torch.tensor([0, *reversed(bounds)], device=values.device)
    return middle + (first[bounds[1:]] - first[bounds[:-1]]) / (total[bounds[1:]] - total[bounds[:-1]])


def levels(values_N: Tensor, entries: int, start: Tensor | None = None, iterations: int = 100) -> Tensor:
    """Centres of values by k-means in one dimension: one sort, then ``O(K log N)`` an iteration.

    Without a start it begins at the optimum for the values drawn together in some 1000 runs, which is the optimum itself for fewer values.
    It ends where nothing moves. The centres are rising, of the values' dtype (float32 or better); they repeat where the values have fewer
    than ``entries`` distinct ones.

    Example:
        >>> levels(torch.tensor([0.0, 10.0, 1.0, 11.0]), 2)
        tensor([ 0.5000, 10.5000])
    """
    dtype = torch.promote_types(values_N.dtype, torch.float32)
    values = values_N.to(dtype).sort().values
    sums = torch.cat([values.new_zeros(1, dtype=widest_float(values.device)), widened(values).cumsum(0)])
    squares = torch.cat([sums[:1], widened(values).square().cumsum(0)])
    centres = _coarse_optimum(values, sums, entries) if start is None else widened(start).sort().values
    for _ in range(iterations):
        bounds = _bounds(values, centres)
        count, total = bounds.diff(), sums[bounds].diff()
        moved = torch.where(count > 0, total / count.clamp(min=1), centres)
        if bool((count == 0).any()):
            moved = _refill(values, bounds, moved, squares[bounds].diff() - total.square() / count.clamp(min=1))
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.to(dtype)


def _coarse_optimum(values: Tensor, sums: Tensor, entries: int) -> Tensor:
    """The optimum for runs of neighbouring values, some of equal numbers of values and some, for the tails, of equal width."""
    runs = max(min(len(values), _COARSE), entries)
    equal = torch.linspace(0, len(values), runs + 1, dtype=torch.float64).round().long().to(values.device)
    steps = torch.linspace(0, 1, runs, dtype=values.dtype, device=values.device)
    wide = torch.searchsorted(values, torch.lerp(values[0], values[-1], steps))
    edges = torch.cat([equal, wide]).unique()
    counts = edges.diff()
    return optimal_levels(sums[edges].diff() / counts, entries, counts)


def _bounds(values: Tensor, centres: Tensor) -> Tensor:
    """Where each centre's run of the sorted values begins and ends, shape (K + 1,)."""
    middles = (centres[1:] + centres[:-1]) / 2
    inner = torch.searchsorted(values, middles.to(values.dtype))
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(values))])


def _refill(values: Tensor, bounds: Tensor, centres: Tensor, errors: Tensor) -> Tensor:
    """Give each centre without values the value furthest out in the run with the largest error."""
    centres, errors = centres.clone(), errors.clone()
    for empty in (bounds.diff() == 0).nonzero().flatten().tolist():
        worst = int(errors.argmax())
        if not float(errors[worst]) > 0:
            break
        ends = widened(values[torch.stack([bounds[worst], bounds[worst + 1] - 1])])
        centres[empty] = ends[(ends - centres[worst]).abs().argmax()]
        errors[worst] = 0
    return centres.sort().values


def nearest(values: Tensor, entries_K: Tensor) -> Tensor:
    """Index of the nearest of rising entries for each value; half-way between two, the upper one.

    Example:
        >>> nearest(torch.tensor([-3.0, 0.0, 0.4]), torch.tensor([-1.0, 1.0]))
        tensor([0, 1, 1])
    """
    middles = (entries_K[1:] + entries_K[:-1]) / 2
    return torch.bucketize(values.contiguous(), middles.to(values.dtype), right=True)


def nearest_vectors(points_ND: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centre of each point, int64 (N,), and the squared distance to it, (N,); in pieces that memory holds."""
    rows = max(1, _CHUNK // len(centres_KD))
    norms_K = centres_KD.square().sum(1)
    codes, distances = [], []
    for part in points_ND.split(rows):
        best = torch.addmm(norms_K, part, centres_KD.t(), alpha=-2).min(1)
        codes.append(best.indices)
        distances.append((best.values + part.square().sum(1)).clamp(min=0))
    return torch.cat(codes), torch.cat(distances)


def cluster_vectors(points_ND: Tensor, entries: int, start: Tensor | None = None, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """k-means of vectors: ``entries`` = K centres, and the index of each point's nearest, int64. It ends where no point changes its centre.

    It begins at ``start``, or at K points spread evenly over the points in order of their norms. A centre that loses all its points goes to
    the point with the largest error.

    Example:
        >>> centres, codes = cluster_vectors(torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), 2)
        >>> centres.tolist(), codes.tolist()
        ([[0.0, 0.5], [5.0, 5.0]], [0, 0, 1])
    """
    if start is None:
        picked = torch.linspace(0, len(points_ND) - 1, entries, dtype=torch.float64).round().long().to(points_ND.device)
        start = points_ND[points_ND.square().sum(1).argsort(stable=True)[picked]]
    centres, codes = start.to(points_ND.dtype), None
    for _ in range(iterations):
        found, _ = nearest_vectors(points_ND, centres)
        if codes is not None and torch.equal(found, codes):
            break
        codes = found
        count = torch.bincount(codes, minlength=entries)
        sums = _sums(points_ND, codes, entries)
        centres = torch.where(count.unsqueeze(1) > 0, sums / count.clamp(min=1).unsqueeze(1), centres)
        distances = (points_ND - centres[codes]).square().sum(1)
        for empty in (count == 0).nonzero().flatten().tolist():
            centres[empty] = points_ND[distances.argmax()]
            distances = torch.minimum(distances, (points_ND - centres[empty]).square().sum(1))  # the next goes elsewhere
    return centres, nearest_vectors(points_ND, centres)[0]


def _sums(points_ND: Tensor, codes: Tensor, entries: int) -> Tensor:
    """The sum of the points of each centre, shape (K, D), added up in the same order every time."""
    sums = points_ND.new_zeros(entries, points_ND.shape[1])
    if points_ND.device.type == "cpu":
        return sums.index_add_(0, codes, points_ND)
    return sums.index_put_((codes,), points_ND, accumulate=True)  # sorts; a GPU's index_add_ adds as its threads happen to come
