"""Codes in the order of their weight: in C in one pass over memory, up to the float weights; with numpy the codes alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.bitplanes import Values
from diffq_fx.export.packed.classes import NO_CLASS
from diffq_fx.export.packed.streams import DecodedStream
from diffq_fx.kernels import extension

# The structures of unpacking.c, whose pointers are numbers here.
_PLANE = np.dtype([("bytes", np.int64), ("size", np.int64), ("bits", np.int32), ("shift", np.int32)])
_PART_FIELDS = """
    planes first_plane counts next ahead used filled widths width_row width_group bins bin_row classes bin_number rows columns block
    scale zero_point offset centre row group by_width weights codes8 codes16
""".split()
_PART = np.dtype([(name, np.int64) for name in _PART_FIELDS])


class Streams:
    """The streams of all classes of a shard, their planes ready for the kernel."""

    def __init__(self, streams: Sequence[DecodedStream]) -> None:
        flat = [plane for stream in streams for plane in stream.planes]
        self.by_class = streams
        self.planes = np.array([(p.data.ctypes.data, len(p.data), p.bits, p.shift) for p in flat], _PLANE)
        self.first_plane = np.cumsum([0, *[len(stream.planes) for stream in streams]], dtype=np.int32)
        self.counts = np.array([stream.count for stream in streams], np.int64)


class Grouping(NamedTuple):
    """Rows of a weight, and the class of each of their groups. In a stream codes lie by tile: whole blocks, then the short last ones."""

    rows: int
    columns: int
    block: int
    widths: NDArray[np.uint8]  # shape (R, C): R is 1 or the rows, C is 1 or the groups of a row
    bins: NDArray[np.uint8]  # shape (R,)
    classes: NDArray[np.uint16]  # by width and bin

    def tiles(self) -> list[tuple[slice, int]]:
        """The groups of a row that have one length, and that length.

        Example:
            >>> Grouping(2, 11, 4, *[np.zeros((1, 1), np.uint8)] * 3).tiles()
            [(slice(0, 2, None), 4), (slice(2, 3, None), 3)]
        """
        whole, rest = divmod(self.columns, self.block)
        return [(slice(0, whole), self.block), *([(slice(whole, whole + 1), rest)] if rest else [])]

    def places(self) -> Iterator[tuple[int, slice, int, NDArray[np.bool_]]]:
        """For each class of each tile, in order: the class, the tile's columns, the length of its groups, and which are of that class."""
        for groups, length in self.tiles():
            widths = self.widths if self.widths.shape[1] == 1 else self.widths[:, groups]
            found = np.broadcast_to(self.classes[widths, self.bins[:, None]], (self.rows, groups.stop - groups.start))
            columns = slice(groups.start * self.block, groups.start * self.block + found.shape[1] * length)
            for index in np.unique(found).tolist():
                yield index, columns, length, found == index

    def counts(self, number: int) -> NDArray[np.int64]:
        """Codes of each of so many classes; an error if a group has none."""
        total = np.zeros(number, np.int64)
        for groups, length in self.tiles():
            cells = count_cells(self, groups)
            present = np.nonzero(cells)
            found = self.classes[present]
            if (found == NO_CLASS).any():
                raise PackedFileError("a group of weights has no model")
            total += np.bincount(found, cells[present], number).astype(np.int64) * length
        return total


class Grid(NamedTuple):
    """The grid of each group, arrays of shape (R, C) that broadcast with the groups; or of each width, arrays of shape (17,)."""

    scale: NDArray[np.float32]
    centre: NDArray[np.int32]  # the level from which codes count
    zero_point: NDArray[np.float32] | None
    offset: NDArray[np.float32] | None


@dataclass(frozen=True)
class DecodedPart:
    """Some rows of a weight as they come out of a shard, with codes that are still in their streams. Legend: O rows, I columns."""

    present: NDArray[np.uint8]  # the widths that occur, rising
    integers: Values  # shape (n,), such as zero points
    floats: bytes  # stored as it is, such as scales
    streams: Streams
    first: NDArray[np.int64]  # the value of each stream that the part begins with
    grouping: Grouping

    @property
    def rows(self) -> int:
        """O."""
        return self.grouping.rows

    @property
    def widths(self) -> NDArray[np.uint8]:
        """Bits of each group, shape (R, C)."""
        return self.grouping.widths

    @cached_property
    def codes(self) -> Values:
        """The codes, shape (O, I)."""
        out = np.empty((self.rows, self.grouping.columns), np.uint8 if self.present[-1] <= 8 else np.uint16)
        fill_in_order(self.streams, self.first, self.grouping, None, out)
        return out


def count_cells(grouping: Grouping, groups: slice) -> NDArray[np.int64]:
    """How many of some groups of each row are of each width and bin, shape of ``grouping.classes``.

    Example:
        >>> widths, bins = np.array([[2, 3], [3, 3]], np.uint8), np.zeros(1, np.uint8)
        >>> count_cells(Grouping(2, 8, 4, widths, bins, np.zeros((17, 2), np.uint16)), slice(0, 2))[:, 0].tolist()[:5]
        [0, 0, 1, 3, 0]
    """
    widths, bins, number = np.ascontiguousarray(grouping.widths), np.ascontiguousarray(grouping.bins), grouping.classes.shape[1]
    counts, loaded = np.zeros(grouping.classes.shape, np.int64), extension.kernels()
    if loaded is None:
        some = widths[:, groups] if widths.shape[1] > 1 else widths
        cells = some.astype(np.int64) * number + bins.reshape(-1, 1)
        times = grouping.rows * (groups.stop - groups.start) // cells.size
        return times * np.bincount(cells.reshape(-1), minlength=counts.size).reshape(counts.shape)
    loaded.count_cells(
        *(widths.ctypes.data, *_strides(widths), bins.ctypes.data, int(len(bins) > 1), number, grouping.rows),
        *(groups.start, groups.stop, counts.ctypes.data),
    )
    return counts


def fill_in_order(streams: Streams, first: NDArray[np.int64], grouping: Grouping, grid: Grid | None, out: NDArray[Any]) -> None:
    """Fill rows with codes, or where a grid is given, which takes the kernel, with weights.

    The level of a code is ``centre + 0, -1, 1, -2, ... mod 2^b``, its weight ``(level - zero_point) * scale``, or
    ``level * scale + offset``. ``first`` is the value of each stream to begin with: the rows take no more than it has. ``out`` is
    contiguous, float32 for weights, uint8 or uint16 for codes.
    """
    if grid is None and extension.kernels() is None:
        _put_in_order(streams, first, grouping, out)
        return
    kernels, number, by_width = extension.loaded(), len(streams.counts), grid is not None and grid.scale.ndim == 1
    arrays = {"planes": streams.planes, "first_plane": streams.first_plane, "counts": streams.counts, "next": np.array(first, np.int64)}
    arrays |= {"ahead": np.empty((number, kernels.AHEAD), np.float32 if by_width else np.uint16)}
    arrays |= {"used": np.zeros(number, np.int32), "filled": np.zeros(number, np.int32)}
    arrays |= {"widths": grouping.widths, "bins": grouping.bins, "classes": grouping.classes}
    if grid is not None:
        arrays |= {name: np.broadcast_to(value, grid.scale.shape) for name, value in grid._asdict().items() if value is not None}
    arrays |= {{"f": "weights", "u": f"codes{8 * out.itemsize}"}[out.dtype.kind]: out}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    part = np.zeros(1, _PART)
    for name, value in arrays.items():
        part[name] = value.ctypes.data
    for name in ("rows", "columns", "block"):
        part[name] = getattr(grouping, name)
    part["width_row"], part["width_group"] = _strides(grouping.widths)
    part["bin_row"], part["bin_number"], part["by_width"] = len(grouping.bins) > 1, grouping.classes.shape[1], by_width
    if grid is not None and not by_width:
        part["row"], part["group"] = _strides(grid.scale)
    kernels.unpack(part.ctypes.data)


def _put_in_order(streams: Streams, first: NDArray[np.int64], grouping: Grouping, out: NDArray[Any]) -> None:
    at = first.copy()
    for index, columns, length, groups in grouping.places():
        count = int(groups.sum()) * length
        values = streams.by_class[index].values(slice(at[index], at[index] + count))
        out[:, columns].reshape(len(out), -1, length)[groups] = values.reshape(-1, length)  # a view: an axis is cut, none is joined
        at[index] += count


def _strides(values: NDArray[Any]) -> tuple[int, int]:
    """Steps from a row to the next and from a group to the next, of shape (R, C); none where one value stands for all."""
    rows, groups = values.shape
    return (groups if rows > 1 else 0), int(groups > 1)
