"""Rows of a weight as they come out of a shard: codes in the order of their classes, to be had in the order of the weight."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffq_fx.export.packed.coding.bitplanes import Values
from diffq_fx.kernels import unpacking


@dataclass(frozen=True)
class PartCodes:
    """Consecutive rows of one weight as the file holds them. Legend: O rows, I columns, (R, C) the groups of those rows."""

    codes: Values
    """Shape (O, I); the coder gains most where small codes are frequent."""
    widths: NDArray[np.uint8]
    """Bits of each group of codes, shape (R, C) of the kind's ``layout`` for these rows."""
    integers: Values
    """Small integers, shape (n,), such as zero points."""
    floats: bytes
    """What is stored as it is, such as scales."""

    @property
    def rows(self) -> int:
        """O."""
        return len(self.codes)


@dataclass(frozen=True)
class DecodedPart(ABC):
    """What has been decoded of a part: as :class:`PartCodes`, and its codes before they are put in order."""

    rows: int
    widths: NDArray[np.uint8]
    present: NDArray[np.uint8]
    """The widths that occur, rising."""
    integers: Values
    floats: bytes

    @property
    @abstractmethod
    def codes(self) -> Values:
        """The codes, shape (O, I), made anew at each call."""

    def assembled(self) -> PartCodes:
        """The part with its codes in order."""
        return PartCodes(self.codes, self.widths, self.integers, self.floats)


class SortedTile(NamedTuple):
    """Groups of one length of a part, in the order of the classes that their codes are coded in."""

    columns: slice
    """Columns that the groups fill."""
    length: int
    """Codes in a group, L."""
    runs: list[tuple[int, Values]]
    """Groups of one width that follow each other: the width, and codes of shape (n, L)."""
    place: NDArray[np.int64] | None
    """Where each group has gone, row by row, shape (G,); None where nothing moved."""

    def rows(self, sorted_groups: NDArray[Any]) -> NDArray[Any]:
        """Something of each sorted group, shape (G, L), in the order of the weight; flat."""
        return (sorted_groups if self.place is None else sorted_groups.take(self.place, 0)).reshape(-1)


@dataclass(frozen=True)
class SortedPart(DecodedPart):
    """A part whose codes have been unpacked class by class, for numpy to work on."""

    tiles: list[SortedTile]

    @property
    def codes(self) -> Values:
        """The codes, shape (O, I)."""
        tiles = [tile.rows(np.concatenate([codes for _, codes in tile.runs])).reshape(self.rows, -1) for tile in self.tiles]
        return tiles[0] if len(tiles) == 1 else np.concatenate(tiles, 1)


@dataclass(frozen=True)
class StreamedPart(DecodedPart):
    """A part whose codes are still in their streams, for the C kernel to unpack and dequantize in one pass."""

    streams: unpacking.Streams
    first: NDArray[np.int64]
    """The value of each stream that the part begins with."""
    grouping: unpacking.Grouping

    @property
    def codes(self) -> Values:
        """The codes, shape (O, I)."""
        out = np.empty((self.rows, self.grouping.columns), np.uint8 if self.present[-1] <= 8 else np.uint16)
        unpacking.unpack(self.streams, self.first, self.grouping, None, out)
        return out

    def fill(self, grid: unpacking.Grid, out: NDArray[np.float32]) -> None:
        """Fill ``out``, shape (O, I), with the weights that the codes are on a grid."""
        unpacking.unpack(self.streams, self.first, self.grouping, grid, out)
