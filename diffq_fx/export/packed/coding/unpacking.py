"""Codes of a packed file in the order of their weight: in C in one pass over memory, up to the float weights; with numpy the codes alone.

``unpacking.c`` reads from several streams at once, each of them a stack of bit planes; ``docs/packed-format.md`` has the terms.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffq_fx.export.packed.coding.bitplanes import unpack_plane
from diffq_fx.kernels import extension

# The structures of unpacking.c, whose pointers are numbers here.
_PLANE = np.dtype([("bytes", np.int64), ("size", np.int64), ("bits", np.int32), ("shift", np.int32)])
_PART_FIELDS = """
    planes first_plane counts next ahead used filled widths width_row width_group bins bin_row classes bin_number rows columns block
    scale offset centre zero_point row group by_width weights codes8 codes16
""".split()
_PART = np.dtype([(name, np.int64) for name in _PART_FIELDS])


class Plane(NamedTuple):
    """``bits`` of each value of a stream, from its bit ``shift`` up: byte k of n holds those of the values k, k + n, k + 2n, ..."""

    data: NDArray[np.uint8]
    bits: int
    shift: int


class Streams:
    """The streams of all classes of a shard, their planes ready for the kernel."""

    def __init__(self, planes: Sequence[Sequence[Plane]], counts: Sequence[int]) -> None:
        flat = [plane for of_class in planes for plane in of_class]
        self._by_class = planes
        self.planes = np.array([(p.data.ctypes.data, len(p.data), p.bits, p.shift) for p in flat], _PLANE)
        self.first_plane = np.cumsum([0, *[len(of_class) for of_class in planes]], dtype=np.int32)
        self.counts = np.array(counts, np.int64)

    def values(self, index: int, first: int, count: int) -> NDArray[np.uint16]:
        """Some values of a class, unpacked with numpy."""
        values, some = np.zeros(count, np.uint16), slice(first, first + count)
        for plane in self._by_class[index]:
            values |= unpack_plane(plane.data, plane.bits, int(self.counts[index]), some).astype(np.uint16) << np.uint16(plane.shift)
        return values


class Grouping(NamedTuple):
    """Rows of a weight, and the class of each of their groups."""

    rows: int
    columns: int
    block: int
    widths: NDArray[np.uint8]
    """Shape (R, C): R is 1 or the rows, C is 1 or the groups of a row."""
    bins: NDArray[np.uint8]
    """Shape (R,)."""
    classes: NDArray[np.uint16]
    """By width and bin."""


class Grid(NamedTuple):
    """The grid of each group, arrays of shape (R, C) that broadcast with the groups; or of each width, arrays of shape (17,)."""

    scale: NDArray[np.float32]
    centre: NDArray[np.int32]
    """The level from which codes count."""
    zero_point: NDArray[np.int32] | None
    offset: NDArray[np.float32] | None


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


def unpack(streams: Streams, first: NDArray[np.int64], grouping: Grouping, grid: Grid | None, out: NDArray[Any]) -> None:
    """Fill rows with codes, or where a grid is given, which takes the kernel, with weights.

    The level of a code is ``centre + 0, -1, 1, -2, ... mod 2^b``, its weight ``(level - zero_point) * scale``, or
    ``level * scale + offset``.

    Args:
        streams: where the codes are.
        first: the value of each stream to begin with.
        grouping: the rows; they take no more values from a stream than it has.
        grid: float32 scales and what else makes weights; None for codes.
        out: shape (rows, columns), contiguous; float32 for weights, uint8 or uint16 for codes.

    Raises:
        RuntimeError: there is a grid and no kernel: see :func:`diffq_fx.kernels.extension.kernels`.
    """
    if grid is None and extension.kernels() is None:
        _put_in_order(streams, first, grouping, out)
        return
    kernels, number = extension.loaded(), len(streams.counts)
    by_width = grid is not None and grid.scale.ndim == 1
    values = np.empty((number, kernels.AHEAD), np.float32 if by_width else np.uint16)
    state = np.array(first, np.int64), values, np.zeros(number, np.int32), np.zeros(number, np.int32)
    widths, bins, classes = (np.ascontiguousarray(each) for each in (grouping.widths, grouping.bins, grouping.classes))
    fields: dict[str, Any] = dict(zip(("next", "ahead", "used", "filled"), state, strict=True))
    fields |= {
        "planes": streams.planes,
        "first_plane": streams.first_plane,
        "counts": streams.counts,
        "widths": widths,
        "bins": bins,
        "classes": classes,
    }
    fields |= {{"f": "weights", "u": f"codes{8 * out.itemsize}"}[out.dtype.kind]: out}
    sizes = {"bin_row": int(len(bins) > 1), "bin_number": classes.shape[1], "rows": grouping.rows}
    sizes |= {"columns": grouping.columns, "block": grouping.block, "by_width": int(by_width)}
    sizes["width_row"], sizes["width_group"] = _strides(widths)
    if grid is not None:
        shape = grid.scale.shape
        arrays = {name: value for name, value in grid._asdict().items() if value is not None}
        each = {name: value if value.shape == shape else np.broadcast_to(value, shape) for name, value in arrays.items()}
        fields |= {name: np.ascontiguousarray(value) for name, value in each.items()}
        if len(shape) == 2:
            sizes["row"], sizes["group"] = _strides(grid.scale)
    part = np.zeros(1, _PART)
    for name, number in ({name: value.ctypes.data for name, value in fields.items()} | sizes).items():
        part[name] = number
    kernels.unpack(part.ctypes.data)


def _put_in_order(streams: Streams, first: NDArray[np.int64], grouping: Grouping, out: NDArray[Any]) -> None:
    """Fill rows with codes, class by class: the whole blocks of all rows, then the shorter blocks at their ends."""
    rows, columns, block, widths, bins, classes = grouping
    of_group = np.broadcast_to(classes[widths, bins.reshape(-1, 1)], (rows, -(-columns // block)))
    at, whole = first.copy(), columns // block
    for groups, length in ((slice(0, whole), block), (slice(whole, None), columns % block)):
        some = of_group[:, groups] if length else of_group[:, :0]
        tile = np.empty((*some.shape, length), out.dtype)
        for index in np.unique(some).tolist():
            is_here = some == index
            count = int(is_here.sum()) * length
            tile[is_here] = streams.values(index, int(at[index]), count).reshape(-1, length)
            at[index] += count
        out[:, groups.start * block : groups.start * block + some.shape[1] * length] = tile.reshape(rows, -1)


def _strides(values: NDArray[Any]) -> tuple[int, int]:
    """Steps from a row to the next and from a group to the next, of shape (R, C); none where one value stands for all."""
    rows, groups = values.shape
    return (groups if rows > 1 else 0), int(groups > 1)
