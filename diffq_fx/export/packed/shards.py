"""A shard: rows of one or several weights that are coded together, and can be read without the rest of the file.

Its bytes are five sections: the widths of all groups, the bins of all rows, small integers (zero points), floats (scales), codes. Zeros
fill the shard up to one byte for 128 weights, so that a reader can refuse a shape that is too large for the file before it allocates.

Within a shard the order is: spans, parts of a span, tiles of a part (its blocks, then the shorter blocks at the ends of its rows), and in a
tile its groups by class, in the order of rows within a class. Legend: O rows, I columns, C groups of a row, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq_fx.export.packed.coding.classes import ClassTable, CodeClass
from diffq_fx.export.packed.coding.unpacking import Grouping, count_cells
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.functional.groups import GroupLayout

WEIGHTS_PER_BYTE = 128
"""A shard has at least a byte for so many weights."""
_PART_WEIGHTS = 1 << 20
"""Weights that are worked on at once: few enough for small temporaries, enough that threads do not fight for the interpreter."""
SECTIONS = 5


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one weight."""

    weight: int
    """Number of the weight in the file."""
    first_row: int
    rows: int

    def parts(self, columns: int) -> Iterator[slice]:
        """The rows that are worked on at once."""
        step = max(_PART_WEIGHTS // columns, 1)
        stop = self.first_row + self.rows
        return (slice(first, min(first + step, stop)) for first in range(self.first_row, stop, step))


@dataclass(frozen=True)
class Part:
    """Some rows of a span, and the weight that they belong to."""

    weight: int
    packed: PackedWeight
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its codes."""
        return self.rows.stop - self.rows.start, self.packed.layout.columns


def parts_of(spans: Sequence[Span], weights: Sequence[PackedWeight]) -> list[Part]:
    """The parts of a shard in order."""
    return [Part(span.weight, weights[span.weight], rows) for span in spans for rows in span.parts(weights[span.weight].spec.columns)]


def least_bytes(spans: Sequence[Span], weights: Sequence[PackedWeight]) -> int:
    """Bytes that a shard of these rows has at least."""
    return -(-sum(span.rows * weights[span.weight].spec.columns for span in spans) // WEIGHTS_PER_BYTE)


@dataclass(frozen=True)
class ShardHead:
    """What the file's header says of a shard's bytes."""

    classes: tuple[CodeClass, ...]
    sections: tuple[int, ...]
    """Bytes of each section."""


def tiles_of(layout: GroupLayout) -> list[tuple[slice, int]]:
    """Columns that groups of one length fill, and that length.

    Example:
        >>> tiles_of(GroupLayout.of(2, 11, 4))
        [(slice(0, 8, None), 4), (slice(8, 11, None), 3)]
    """
    columns, block = layout.columns, layout.block
    whole = columns - columns % block
    tiles = [(slice(0, whole), block), (slice(whole, columns), columns - whole)]
    return [(where, length) for where, length in tiles if length]


@dataclass(frozen=True)
class Tile:
    """Groups of one length of a part."""

    columns: slice
    length: int
    """Codes in a group."""
    classes: NDArray[np.uint16]
    """Class of each group, shape (n,), row by row."""

    def counts(self, number: int) -> NDArray[np.int64]:
        """Codes of each of so many classes."""
        return np.bincount(self.classes, minlength=number) * self.length

    def order(self) -> NDArray[np.int64] | None:
        """The groups in the order of their classes, shape (n,); None where they are in it."""
        return None if (self.classes[1:] >= self.classes[:-1]).all() else np.argsort(self.classes, kind="stable")


def tiles_of_part(part: Part, widths: NDArray[np.uint8], bins: NDArray[np.uint8], table: ClassTable) -> list[Tile]:
    """The tiles of a part, whose groups have these widths and whose rows these bins."""
    layout, rows = part.packed.layout, part.shape[0]
    tiles = []
    for columns, length in tiles_of(layout):
        groups = _groups_in(columns, layout)
        classes = table.of(widths[:, groups], bins)
        tiles.append(Tile(columns, length, np.broadcast_to(classes, (rows, groups.stop - groups.start)).reshape(-1)))
    return tiles


def grouping_of(part: Part, widths: NDArray[np.uint8], bins: NDArray[np.uint8], table: ClassTable) -> Grouping:
    """A part as the kernel sees it."""
    return Grouping(*part.shape, part.packed.layout.block, widths, bins, table.table)


def counts_of_part(part: Part, widths: NDArray[np.uint8], bins: NDArray[np.uint8], table: ClassTable) -> NDArray[np.int64]:
    """Codes of each class in a part, shape (K,).

    Raises:
        PackedFileError: the table has no class for one of the groups.
    """
    grouping, layout = grouping_of(part, widths, bins, table), part.packed.layout
    return sum(
        (table.sums(count_cells(grouping, _groups_in(columns, layout))) * length for columns, length in tiles_of(layout)),
        np.zeros(len(table.classes), np.int64),
    )


def _groups_in(columns: slice, layout: GroupLayout) -> slice:
    return slice(columns.start // layout.block, -(-columns.stop // layout.block))
