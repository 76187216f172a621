"""A shard: rows of one or several weights that are coded together, and can be read without the rest of the file.

Its bytes are five sections: the widths of all groups, the bins of all rows, small integers (zero points), floats (scales), codes. Zeros
fill the shard up to one byte for 128 weights, so that a reader can refuse a shape that is too large for the file before it allocates.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffq_fx.export.packed.bitplanes import Values, narrow
from diffq_fx.export.packed.classes import BIN_BITS, CodeClass, Histogram, bins_in, bins_of, class_table, merged_bins
from diffq_fx.export.packed.container import Source
from diffq_fx.export.packed.streams import Effort, Stream, decode_block, decode_bytes, encode_block, encode_bytes
from diffq_fx.export.packed.unpacking import DecodedPart, Grouping, Streams
from diffq_fx.export.packed.weight_kind import PackedWeight, PartCodes, expanded
from diffq_fx.storage import StoredWeight

SECTIONS = 5
FEW_WEIGHTS = 1 << 19  # weights that the slower coder of entropy may take, some tens of milliseconds
_PART_WEIGHTS = 1 << 20
"""Weights that are worked on at once: few enough for small temporaries, enough that threads do not fight for the interpreter."""
_LEAST_CODES, _MOST_CODES = 1 << 21, 1 << 23
_SHARDS = 4  # shards of a model that is neither small nor large: enough for a few threads, few enough to fill the coder's lanes


class Span(NamedTuple):
    """Consecutive rows of one weight, which has this number in the file."""

    weight: int
    first_row: int
    rows: int


class Shard(NamedTuple):
    """What the file's header says of a shard's bytes, and where they lie."""

    spans: tuple[Span, ...]
    classes: tuple[CodeClass, ...]
    sections: tuple[int, ...]  # bytes of each section
    crc32: int
    start: int
    stop: int


class ShardPart(NamedTuple):
    """Rows of a span that are worked on at once, and the weight that they belong to."""

    weight: int
    packed: PackedWeight
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its codes."""
        return self.rows.stop - self.rows.start, self.packed.layout.columns

    def grouping(self, widths: NDArray[np.uint8], bins: NDArray[np.uint8], table: NDArray[np.uint16]) -> Grouping:
        """The classes of its groups, which have these widths and whose rows have these bins."""
        return Grouping(*self.shape, self.packed.layout.block, widths, bins, table)


def _parts_of(spans: Sequence[Span], weights: Sequence[PackedWeight]) -> Iterator[ShardPart]:
    for index, first_row, rows in spans:
        step, stop = max(_PART_WEIGHTS // weights[index].spec.columns, 1), first_row + rows
        for first in range(first_row, stop, step):
            yield ShardPart(index, weights[index], slice(first, min(first + step, stop)))


def shard_size(sections: Sequence[int], spans: Sequence[Span], weights: Sequence[PackedWeight]) -> int:
    """Bytes of a shard with such sections: their sum, filled up to a byte for 128 weights."""
    return max(sum(sections), -(-_numel(spans, weights) // 128))


def _numel(spans: Sequence[Span], weights: Sequence[PackedWeight]) -> int:
    return sum(span.rows * weights[span.weight].spec.columns for span in spans)


def plan_shards(weights: Sequence[PackedWeight]) -> list[list[Span]]:
    """Divide the rows of all weights, in order, into the spans of shards of about equal size."""
    total = sum(weight.spec.numel for weight in weights)
    number = -(-total // min(max(-(-total // _SHARDS), _LEAST_CODES), _MOST_CODES))
    room = -(-total // max(number, 1))
    shards: list[list[Span]] = []
    left = 0
    for index, weight in enumerate(weights):
        row, columns = 0, weight.spec.columns
        while row < weight.spec.rows:
            if left < columns / 2:
                shards.append([])
                left += room
            rows = min(max(round(left / columns), 1), weight.spec.rows - row)
            shards[-1].append(Span(index, row, rows))
            row += rows
            left -= rows * columns
    return shards


def encode_shard(
    spans: Sequence[Span], weights: Sequence[PackedWeight], stored: Sequence[StoredWeight], *, entropy: bool
) -> tuple[bytes, dict[str, Any]]:
    """The bytes of these rows, and what the header must say of them; ``stored`` are what all weights of the file pack."""
    effort = Effort(entropy, is_patient=_numel(spans, weights) <= FEW_WEIGHTS)
    parts = list(_parts_of(spans, weights))
    codes = [part.packed.encode(stored[part.weight], part.rows) for part in parts]
    histogram, bins = Histogram(), []
    for part, each in zip(parts, codes, strict=True):
        widths = expanded(each.widths, part.packed.layout)
        bins.append(bins_of(each.codes, widths) if entropy else np.zeros(1, np.uint8))
        histogram.add(each.codes, widths, bins[-1])
    classes = histogram.classes(by_bin=entropy)
    merged, table = merged_bins(classes), class_table(classes)
    groupings = [part.grouping(each.widths, merged[row_bins], table) for part, each, row_bins in zip(parts, codes, bins, strict=True)]
    sections = (
        encode_block([Stream(4, np.concatenate([each.widths.reshape(-1) for each in codes]) - np.uint8(1))], effort),
        encode_block([Stream(BIN_BITS, np.concatenate([each.bins for each in groupings]))], effort) if entropy else b"",
        encode_block(_integer_streams(parts, codes), effort),
        encode_bytes(b"".join(each.floats for each in codes), effort),
        encode_block(_code_streams(groupings, codes, classes), effort),
    )
    sizes, data = tuple(map(len, sections)), b"".join(sections)
    data = data.ljust(shard_size(sizes, spans, weights), b"\0")
    return data, {"crc32": zlib.crc32(data), "spans": spans, "classes": classes, "sections": sizes}


def _code_streams(groupings: Sequence[Grouping], parts: Sequence[PartCodes], classes: Sequence[CodeClass]) -> list[Stream]:
    """The codes of each class, in the order of tiles and groups."""
    pieces: list[list[Values]] = [[] for _ in classes]
    for grouping, part in zip(groupings, parts, strict=True):
        for index, columns, length, groups in grouping.places():
            pieces[index].append(part.codes[:, columns].reshape(grouping.rows, -1, length)[groups].reshape(-1))
    return [Stream(each.width, narrow(np.concatenate(piece), each.width)) for each, piece in zip(classes, pieces, strict=True)]


def _integer_streams(parts: Sequence[ShardPart], codes: Sequence[PartCodes]) -> list[Stream]:
    """The small integers by their width, from 1 to 16 bits, where there are any."""
    values = np.concatenate([each.integers for each in codes])
    widths = np.concatenate([part.packed.integer_widths(each.widths, part.shape[0]) for part, each in zip(parts, codes, strict=True)])
    return [Stream(width, narrow(values[widths == width], width)) for width in np.unique(widths).tolist()]


class DecodedShard:
    """The codes of a shard by class, and everything else that its parts need."""

    def __init__(self, source: Source, shard: Shard, weights: Sequence[PackedWeight]) -> None:
        """Read and decode a shard whose spans, weights and size the caller has checked; an error if the bytes are not of these spans."""
        self._parts = list(_parts_of(shard.spans, weights))
        self._classes, table = shard.classes, class_table(shard.classes)
        widths_size, bins_size, integers_size, floats_size, codes_size = shard.sections
        widths = self._decode_widths(source, widths_size)
        bins = self._decode_bins(source, bins_size)
        self._groupings = [part.grouping(*each, table) for part, *each in zip(self._parts, widths, bins, strict=True)]  # pyright: ignore
        self._integers = self._decode_integers(source, integers_size)
        sizes = [part.packed.float_bytes(part.shape[0]) for part in self._parts]
        self._floats = _split(decode_bytes(source, floats_size, sum(sizes)), sizes)
        self._counts = [grouping.counts(len(shard.classes)) for grouping in self._groupings]
        totals = np.sum(self._counts, axis=0).tolist()
        expected = [(each.width, count) for each, count in zip(shard.classes, totals, strict=True)]
        self._streams = Streams(decode_block(source, codes_size, expected))
        source.skip(zeros=True)
        for part, codes in self.parts():
            part.packed.check_codes(codes)

    def _decode_widths(self, source: Source, size: int) -> list[NDArray[np.uint8]]:
        shapes = [part.packed.widths_shape(part.shape[0]) for part in self._parts]
        sizes = [groups_R * groups_C for groups_R, groups_C in shapes]
        values = decode_block(source, size, [(4, sum(sizes))])[0].values()
        np.add(values, 1, values)  # its own array: a width takes 4 bits
        found = [piece.reshape(shape) for piece, shape in zip(_split(values, sizes), shapes, strict=True)]
        for part, widths in zip(self._parts, found, strict=True):
            part.packed.check_widths(widths)
        return found

    def _decode_bins(self, source: Source, size: int) -> list[NDArray[np.uint8]]:
        counts = [bins_in(*part.shape) for part in self._parts]
        if not size:
            return [np.zeros(1, np.uint8)] * len(counts)
        return _split(decode_block(source, size, [(BIN_BITS, sum(counts))])[0].values(), counts)

    def _decode_integers(self, source: Source, size: int) -> list[Values]:
        widths = [part.packed.integer_widths(each.widths, each.rows) for part, each in zip(self._parts, self._groupings, strict=True)]
        each = np.concatenate(widths)
        present, counts = np.unique(each, return_counts=True)
        values = np.zeros(len(each), np.uint16)
        for stream in decode_block(source, size, list(zip(present.tolist(), counts.tolist(), strict=True))):
            values[each == stream.width] = stream.values()
        return _split(values, [len(of_part) for of_part in widths])

    def parts(self) -> Iterator[tuple[ShardPart, DecodedPart]]:
        """The parts in order, each with its codes."""
        first = np.zeros(len(self._classes), np.int64)
        for index, (part, grouping, counts) in enumerate(zip(self._parts, self._groupings, self._counts, strict=True)):
            present = np.array(sorted({self._classes[each].width for each in np.flatnonzero(counts)}), np.uint8)
            yield part, DecodedPart(present, self._integers[index], self._floats[index], self._streams, first, grouping)
            first = first + counts


def _split(values: Any, counts: Sequence[int]) -> list[Any]:
    """The first so many values, the next, and so on."""
    stops = np.cumsum(counts).tolist()
    return [values[stop - count : stop] for stop, count in zip(stops, counts, strict=True)]
