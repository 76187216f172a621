"""Rows of a weight as they come out of a shard: codes in the order of their classes, to be had in the order of the weight."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq_fx.export.packed.coding import unpacking
from diffq_fx.export.packed.coding.bitplanes import Values


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
class DecodedPart:
    """What has been decoded of a part: as :class:`PartCodes`, with codes that are still in their streams."""

    rows: int
    widths: NDArray[np.uint8]
    present: NDArray[np.uint8]
    """The widths that occur, rising."""
    integers: Values
    floats: bytes
    streams: unpacking.Streams
    first: NDArray[np.int64]
    """The value of each stream that the part begins with."""
    grouping: unpacking.Grouping

    @property
    def codes(self) -> Values:
        """The codes, shape (O, I), made anew at each call."""
        out = np.empty((self.rows, self.grouping.columns), np.uint8 if self.present[-1] <= 8 else np.uint16)
        unpacking.unpack(self.streams, self.first, self.grouping, None, out)
        return out

    def fill(self, grid: unpacking.Grid, out: NDArray[np.float32]) -> None:
        """Fill ``out``, shape (O, I), with the weights that the codes are on a grid, by the C kernel."""
        unpacking.unpack(self.streams, self.first, self.grouping, grid, out)

    def assembled(self) -> PartCodes:
        """The part with its codes in order."""
        return PartCodes(self.codes, self.widths, self.integers, self.floats)
