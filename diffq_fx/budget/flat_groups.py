"""The groups of all weights of a model in one row, so that size costs a few kernels and not a few per weight.

Shape legend: T groups in all, W weights, N groups of one segment.
"""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffq_fx import _compat
from diffq_fx.functional import AROUND_ZERO
from diffq_fx.weights import WeightSpec

_WIDTH_HEADER_BITS = 8
"""Smallest and largest width of a weight, 4 bits each; the widths are coded relative to them."""
_LARGE = 1 << 14
"""Groups from which on a weight is worked on alone by a CPU, without a copy into one row with others. Elsewhere a call takes longer."""


def bit_costs(spec: WeightSpec) -> tuple[Tensor, int]:
    """What one weight stores: values per group that take the group's width, and bits that no width changes.

    A symmetric range is one float (its scale), an affine one a scale and a zero point of the group's width, to which the "half" grid adds
    a bit. Where a range holds groups of several widths, or has a float offset, both of its ends are stored.

    Example:
        >>> values, fixed = bit_costs(WeightSpec(name="w", shape=(2, 8), axis=0))
        >>> values.tolist(), fixed
        ([[9], [9]], 72)
    """
    values, ranges = spec.bits_layout.counts(), spec.range_layout
    if spec.grid == "symmetric":
        return values, spec.scale_bits * ranges.num_groups + _WIDTH_HEADER_BITS
    several_widths_in_a_range = spec.bits_layout.num_groups > ranges.num_groups
    if spec.grid == "float" or several_widths_in_a_range:
        return values, 2 * spec.scale_bits * ranges.num_groups + _WIDTH_HEADER_BITS
    each = spec.scale_bits + (spec.grid == "half")
    return values + ranges.num_groups // spec.bits_layout.num_groups, each * ranges.num_groups + _WIDTH_HEADER_BITS


def container_costs(spec: WeightSpec) -> tuple[Tensor, int]:
    """What an ONNX file stores of one weight, as :func:`bit_costs`: a float scale for each group, a zero point as wide as its levels.

    On the "half" grid the file has a zero point doubled, in the next container.

    Example:
        >>> values, fixed = container_costs(WeightSpec(name="w", shape=(2, 8), axis=0))
        >>> values.tolist(), fixed
        ([[9], [9]], 64)
    """
    values, scales = spec.bits_layout.counts(), spec.scale_layout.num_groups
    zero_points = scales // spec.bits_layout.num_groups if spec.grid in AROUND_ZERO else 0
    return values + (2 if spec.grid == "half" else 1) * zero_points, spec.scale_bits * scales


@dataclass(frozen=True)
class WidthLimits:
    """Between which widths the bits of a weight move in training, and which ones rounding may choose, rising."""

    min_bits: float = 1
    max_bits: float = 16
    widths: tuple[int, ...] = tuple(range(1, 17))


@dataclass(frozen=True)
class Alike:
    """All weights with the same limits."""

    limits: WidthLimits
    weights: tuple[int, ...]
    places: tuple[slice, ...]
    """Where their groups are in the row of all groups."""

    def of(self, row_T: Tensor) -> Tensor:
        """Their part of a row: a view where these are all weights."""
        return row_T[self.places[0]] if len(self.places) == 1 else torch.cat([row_T[place] for place in self.places])


@dataclass(frozen=True)
class Segment:
    """Weights that are worked on together: one with many groups, or all those with few and the same limits."""

    limits: WidthLimits
    weights: tuple[int, ...]
    counts: tuple[int, ...]
    values: Tensor
    """Stored values per group, shape (N,); a view of one number where all groups have as many."""
    has_few: bool
    """Whether these are the weights with few groups."""
    columns: int | None = None
    """Groups in a row of each weight, where they all have as many: one call then puts them side by side."""
    _opened: list[Tensor] = field(default_factory=list)
    """The row of :meth:`open` and each weight's part of it, made when it is first needed."""

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """One value per group of each weight of the model, as a row: a view where the segment is one weight."""
        if len(self.weights) == 1:
            return tensors[self.weights[0]].reshape(-1)
        own = [tensors[i] for i in self.weights]
        return _compat.flatten(own) if self.columns is None else torch.cat(own).reshape(-1)  # a third of the time

    def split(self, row_N: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A row as one tensor per weight of the segment, views of the row in the shapes of ``tensors``."""
        return _compat.unflatten(row_N, [tensors[i] for i in self.weights])

    def open(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same as :meth:`gather`, to be changed in place until :meth:`close` writes it back; one row of a segment at a time."""
        if len(self.weights) == 1:
            return self.gather(tensors)
        own = [tensors[i] for i in self.weights]
        if not self._opened:  # 300 views take longer to make than all the rest
            row_N = _compat.flatten(own)
            self._opened[:] = [row_N, *_compat.unflatten(row_N, own)]
        elif self.columns is None:
            _compat.copy_each(self._opened[1:], own)
        else:
            torch.cat(own, out=self._opened[0].view(-1, self.columns))
        return self._opened[0]

    def close(self, row_N: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write what :meth:`open` gave back to where it came from."""
        own = [tensors[i] for i in self.weights]
        if len(own) > 1:
            _compat.copy_each(own, self._opened[1:])
        elif row_N.data_ptr() != own[0].data_ptr():
            own[0].copy_(row_N.view_as(own[0]))


class FlatGroups:
    """The groups of all weights of a model; with ``in_containers`` as an ONNX file stores them, whose containers say how wide they are."""

    def __init__(
        self,
        specs: Sequence[WeightSpec],
        device: torch.device,
        *,
        limits: Sequence[WidthLimits] | None = None,
        in_containers: bool = False,
    ) -> None:
        self.in_containers = in_containers
        self._limits = [WidthLimits()] * len(specs) if limits is None else list(limits)
        costs = [(container_costs if in_containers else bit_costs)(spec) for spec in specs]
        self.counts = [values.numel() for values, _ in costs]
        self._columns = [spec.bits_layout.shape[1] for spec in specs]
        values_W = [values.reshape(-1).float() for values, _ in costs]
        one_if_equal = (own[:1].expand(len(own)) if bool((own == own[0]).all()) else own for own in values_W)
        self._values = [own.to(device) for own in one_if_equal]
        self.groups_W = torch.tensor(self.counts, dtype=torch.float32, device=device)
        self.min_bits_W, self.max_bits_W = torch.tensor([(own.min_bits, own.max_bits) for own in self._limits], device=device).float().T
        self.device = device
        self.num_groups = sum(self.counts)
        self.fixed_bits = sum(fixed for _, fixed in costs)
        self.num_weights = sum(spec.numel for spec in specs)
        self._note_sets(specs)
        self._segments: dict[tuple[int, ...], list[Segment]] = {}
        self.alike = [self._alike(own) for own in dict.fromkeys(self._limits)]
        self._is_large = [device.type == "cpu" and count >= _LARGE for count in self.counts]
        few = [i for alike in self.alike for i in alike.weights if not self._is_large[i]]  # in the order of the segments
        self._few_weights = few
        self._few = torch.tensor(few, dtype=torch.int64, device=device)
        self._counts_of_few = torch.tensor([self.counts[i] for i in few], dtype=torch.int64, device=device)

    def _note_sets(self, specs: Sequence[WeightSpec]) -> None:
        """Which weights share a width; each of them is one group."""
        starts = [0, *itertools.accumulate(self.counts)]
        numbered = sorted((spec.width_set, i) for i, spec in enumerate(specs) if spec.width_set is not None)
        sets = [[i for _, i in own] for _, own in itertools.groupby(numbered, operator.itemgetter(0))]
        self.in_sets = [i for own in sets for i in own]
        self._set_lengths = torch.tensor([len(own) for own in sets], dtype=torch.int64, device=self.device)
        self._set_places, self._set_firsts = torch.tensor([(starts[i], starts[own[0]]) for own in sets for i in own]).long().view(-1, 2).T

    def as_firsts(self, row_T: Tensor) -> Tensor:
        """Values per group, of weights that share a width the value of the first of them."""
        places, firsts = self._set_places.to(row_T.device), self._set_firsts.to(row_T.device)
        return row_T.index_copy(0, places, row_T[firsts]) if self.in_sets else row_T

    def at_firsts(self, row_T: Tensor) -> Tensor:
        """Values per group, of weights that share a width their sum at the first of them, and nothing at the others."""
        places, firsts = self._set_places.to(row_T.device), self._set_firsts.to(row_T.device)
        return row_T.index_fill(0, places, 0).index_add(0, firsts, row_T[places]) if self.in_sets else row_T

    def even_out(self, tensors: Mapping[int, Tensor]) -> None:
        """Give all weights that share a width the mean of what there is one of for each of them, by the weight's index, in place."""
        members = [i for i in self.in_sets if i in tensors]
        if not members:
            return
        lengths = self._set_lengths
        if len(members) < len(self.in_sets):  # another optimizer has the others
            of_each = torch.arange(len(lengths)).repeat_interleave(lengths.cpu())[[i in tensors for i in self.in_sets]]
            lengths = torch.bincount(of_each, minlength=len(lengths)).to(self.device)
        own = [tensors[i] for i in members]
        mean = torch.segment_reduce(_compat.flatten(own), "mean", lengths=lengths, unsafe=True)
        _compat.copy_each(own, _compat.unflatten(mean.repeat_interleave(lengths, output_size=len(own)), own))

    @property
    def values_T(self) -> Tensor:
        """Stored values of every group, float32."""
        return torch.cat(self._values)

    def _alike(self, limits: WidthLimits) -> Alike:
        weights = [i for i, own in enumerate(self._limits) if own == limits]
        ends = [0, *itertools.accumulate(self.counts)]
        places: list[slice] = []
        for i in weights:
            start = places.pop().start if places and places[-1].stop == ends[i] else ends[i]
            places.append(slice(start, ends[i + 1]))
        return Alike(limits, tuple(weights), tuple(places))

    def by_limits(self, function: Callable[[Tensor, WidthLimits], Tensor], row_T: Tensor) -> Tensor:
        """A function of one value per group, and of the limits, for all groups: one call for all weights with the same limits."""
        if len(self.alike) == 1:
            return function(row_T, self.alike[0].limits)
        found = [function(alike.of(row_T), alike.limits) for alike in self.alike]
        result_T = found[0].new_empty(row_T.shape)
        for alike, own in zip(self.alike, found, strict=True):
            for place, piece in zip(alike.places, own.split([place.stop - place.start for place in alike.places]), strict=True):
                result_T[place] = piece
        return result_T

    def segments(self, weights: Sequence[int] | None = None) -> list[Segment]:
        """The segments of these weights, by default of all."""
        key = tuple(range(len(self.counts)) if weights is None else weights)
        if key not in self._segments:
            asked = set(key)
            few = [tuple(i for i in alike.weights if i in asked and not self._is_large[i]) for alike in self.alike]
            runs: list[tuple[int, ...]] = [(i,) for i in key if self._is_large[i]] + [run for run in few if run]
            self._segments[key] = [
                Segment(
                    self._limits[run[0]],
                    run,
                    tuple(self.counts[i] for i in run),
                    self._values[run[0]] if len(run) == 1 else torch.cat([self._values[i] for i in run]),
                    not self._is_large[run[0]],
                    self._columns[run[0]] if len({self._columns[i] for i in run}) == 1 else None,
                )
                for run in runs
            ]
        return self._segments[key]

    def limits(
        self, tensors: Sequence[Tensor], few_row: Tensor | None = None, known: Mapping[int, tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each weight, shape (W,): a kernel for each large weight, a few for all small ones.

        ``few_row`` is what the small ones gave as a row, ``known`` the limits of large ones, where these are at hand.
        """
        low_W, high_W = torch.empty_like(self.groups_W), torch.empty_like(self.groups_W)
        for i, is_large in enumerate(self._is_large):
            if is_large:
                low_W[i], high_W[i] = known[i] if known and i in known else torch.aminmax(tensors[i])
        if len(self._few):
            row = (_compat.flatten([tensors[i] for i in self._few_weights]) if few_row is None else few_row).float()
            low_W[self._few] = torch.segment_reduce(row, "min", lengths=self._counts_of_few, unsafe=True)
            high_W[self._few] = torch.segment_reduce(row, "max", lengths=self._counts_of_few, unsafe=True)
        return low_W, high_W

    def coding_bits(self, width_T: Tensor) -> Tensor:
        """Bits that code the widths: ``groups * ceil(log2(1 + max - min))`` per weight, summed; 0-d, no device sync."""
        return self.coding_bits_between(*self.limits(self.split(width_T)))

    def coding_bits_between(self, low_W: Tensor, high_W: Tensor) -> Tensor:
        """The same from the smallest and largest width of each weight."""
        if self.in_containers:
            return torch.zeros((), device=self.device)
        return (self.groups_W * torch.ceil(torch.log2(1 + high_W.float() - low_W.float()))).sum()

    def split(self, flat_T: Tensor) -> list[Tensor]:
        """One flat tensor per weight."""
        return list(flat_T.split(self.counts))
