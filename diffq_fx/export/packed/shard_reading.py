"""Reads the bytes of a shard: see :mod:`diffq_fx.export.packed.shards` for what they are."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding import unpacking
from diffq_fx.export.packed.coding.bitplanes import Values
from diffq_fx.export.packed.coding.classes import BIN_BITS, ClassTable, bins_in
from diffq_fx.export.packed.coding.source import Source
from diffq_fx.export.packed.coding.streams import decode_block, decode_bytes
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.export.packed.kinds.decoded import DecodedPart
from diffq_fx.export.packed.shards import Part, ShardHead, Span, counts_of_part, grouping_of, least_bytes, parts_of


def shard_size(sections: Sequence[int], spans: Sequence[Span], weights: Sequence[PackedWeight]) -> int:
    """Bytes of a shard with such sections: their sum, filled up to a byte for 128 weights."""
    return max(sum(sections), least_bytes(spans, weights))


class DecodedShard:
    """The codes of a shard by class, and everything else that its parts need."""

    def __init__(self, source: Source, spans: Sequence[Span], weights: Sequence[PackedWeight], head: ShardHead) -> None:
        """Read and decode a shard whose spans, weights and size the caller has checked.

        Raises:
            PackedFileError: the bytes are damaged, or not of these spans.
        """
        self._parts = parts_of(spans, weights)
        self._table = ClassTable(head.classes)
        sections = (source.part(size) for size in head.sections)
        self._widths = self._decode_widths(next(sections))
        for part, widths in zip(self._parts, self._widths, strict=True):
            part.packed.check_widths(widths)
        self._bins = self._decode_bins(next(sections))
        self._integers = self._decode_integers(next(sections))
        self._floats = self._decode_floats(next(sections))
        described = zip(self._parts, self._widths, self._bins, strict=True)
        self._counts = [counts_of_part(*each, self._table) for each in described]
        totals = np.sum(self._counts, axis=0).tolist()
        expected = [(each.width, count) for each, count in zip(head.classes, totals, strict=True)]
        self._streams = decode_block(next(sections), expected)
        source.end_in_zeros()
        if any(_some_codes_are_too_high(part.packed) for part in self._parts):
            self._check_codes()

    def _decode_widths(self, section: Source) -> list[NDArray[np.uint8]]:
        shapes = [part.packed.widths_shape(part.shape[0]) for part in self._parts]
        sizes = [groups_R * groups_C for groups_R, groups_C in shapes]
        (stream,) = decode_block(section, [(4, sum(sizes))])
        widths = stream.values()
        np.add(widths, 1, widths)  # its own array: a width takes 4 bits
        return [piece.reshape(shape) for piece, shape in zip(_split(widths, sizes), shapes, strict=True)]

    def _check_codes(self) -> None:
        for part, content in self.parts():
            highest, entries = int(content.codes.max()), part.packed.entries
            if entries is not None and highest >= entries:
                raise PackedFileError(f"a code of '{part.packed.spec.name}' is {highest}, it has {entries} entries")

    def _decode_bins(self, section: Source) -> list[NDArray[np.uint8]]:
        counts = [bins_in(*part.shape) for part in self._parts]
        if not section.left:
            return [np.zeros(1, np.uint8)] * len(counts)
        (stream,) = decode_block(section, [(BIN_BITS, sum(counts))])
        return _split(stream.values(), counts)

    def _decode_integers(self, section: Source) -> list[Values]:
        widths = [part.packed.integer_widths(w, part.shape[0]) for part, w in zip(self._parts, self._widths, strict=True)]
        each = np.concatenate(widths)
        present, counts = np.unique(each, return_counts=True)
        streams = decode_block(section, list(zip(present.tolist(), counts.tolist(), strict=True)))
        values = np.zeros(len(each), np.uint16)
        for width, stream in zip(present, streams, strict=True):
            values[each == width] = stream.values()
        return _split(values, [len(w) for w in widths])

    def _decode_floats(self, section: Source) -> list[bytes]:
        sizes = [part.packed.float_bytes(part.shape[0]) for part in self._parts]
        floats, stops = decode_bytes(section, sum(sizes)), np.cumsum(sizes).tolist()
        return [floats[stop - size : stop] for stop, size in zip(stops, sizes, strict=True)]

    def parts(self) -> Iterator[tuple[Part, DecodedPart]]:
        """The parts in order, each with its codes."""
        streams = unpacking.Streams([stream.planes() for stream in self._streams], [stream.count for stream in self._streams])
        first = np.zeros(len(self._streams), np.int64)
        for index, (part, widths, bins) in enumerate(zip(self._parts, self._widths, self._bins, strict=True)):
            grouping, present = grouping_of(part, widths, bins, self._table), self._present(index)
            yield part, DecodedPart(part.shape[0], widths, present, self._integers[index], self._floats[index], streams, first, grouping)
            first = first + self._counts[index]

    def _present(self, index: int) -> NDArray[np.uint8]:
        """The widths of a part's groups."""
        pairs = zip(self._table.classes, self._counts[index].tolist(), strict=True)
        return np.array(sorted({each.width for each, count in pairs if count}), np.uint8)


def _some_codes_are_too_high(packed: PackedWeight) -> bool:
    """Whether a kind has fewer entries than its codes could index."""
    return packed.entries is not None and (packed.entries < 2 or packed.entries.bit_count() > 1)


def _split(values: Values, counts: Sequence[int]) -> list[Values]:
    return np.split(values, np.cumsum(counts)[:-1])
