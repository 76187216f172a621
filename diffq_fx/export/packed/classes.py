"""Which codes share a probability model: those of one width, in rows that use a similar share of their range.

Small codes are frequent, but how far codes spread differs from row to row, since one outlier stretches a row's range; so each row has a
*bin*, the logarithm of its mean code, and a *class* is a width and a range of neighbouring bins. Which bins go together is chosen by the
length of the code, tables included.

Legend: O rows, C groups of a row, B bins, K classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.bitplanes import Values

BINS = 128
BIN_BITS = 7
_BINS_OF_OCTAVE = 16
MAX_WIDTH = 16
_ROW_IS_LONG = 128  # codes of a row that are worth a bin of its own; shorter rows share one
_SYMBOLS = 64
_TABLE_BITS = 1000  # what one more class costs: a head and a table
NO_CLASS = 0xFFFF  # what a table of classes says of a width and bin that have none


def bins_in(rows: int, columns: int) -> int:
    """Number of bins that so many rows have."""
    return rows if columns >= _ROW_IS_LONG else 1


def bins_of(codes: Values, widths: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bin of each row, shape (``bins_in(O, I)``,), of codes (O, I): sixteenths of an octave of the mean code, in shares of its range."""
    share = codes * np.exp2(-1 - widths.astype(np.float32))
    mean = share.mean(axis=1) if bins_in(*codes.shape) == len(codes) else share.mean().reshape(-1)
    return np.clip(np.floor(-_BINS_OF_OCTAVE * np.log2(np.maximum(mean, 1e-9))) - _BINS_OF_OCTAVE, 0, BINS - 1).astype(np.uint8)


class CodeClass(NamedTuple):
    """Codes that share one model."""

    width: int
    first_bin: int
    last_bin: int


class Histogram:
    """How often each symbol occurs at each width and bin."""

    def __init__(self) -> None:
        self._counts = np.zeros((MAX_WIDTH + 1, BINS, _SYMBOLS), np.int64)

    def add(self, codes: Values, widths: NDArray[np.uint8], bins: NDArray[np.uint8]) -> None:
        """Count codes of shape (O, I); ``widths`` and ``bins`` as columns broadcast with them."""
        shift = np.maximum(widths.astype(np.int8) - 6, 0).astype(codes.dtype)
        place = (widths.astype(np.int32) * BINS + bins.reshape(-1, 1)) * _SYMBOLS
        index = (codes >> shift) + place
        self._counts += np.bincount(index.reshape(-1), minlength=self._counts.size).reshape(self._counts.shape)

    def classes(self, *, by_bin: bool) -> list[CodeClass]:
        """The classes that make the code short; without ``by_bin`` one class for each width."""
        found = []
        for width in range(1, MAX_WIDTH + 1):
            counts = self._counts[width]
            if counts.any():
                parts = _partition(counts) if by_bin else [(0, BINS - 1)]
                found += [CodeClass(width, first, last) for first, last in parts]
        return found


def _partition(counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut the bins of counts (B, 64) into runs, first and last bin of each, so that codes and a table for each run are shortest."""
    used = np.flatnonzero(counts.any(1))
    until = np.concatenate([np.zeros((1, _SYMBOLS)), np.cumsum(counts[used], 0)])
    best, cut = np.zeros(len(used) + 1), [0]
    for stop in range(1, len(used) + 1):
        within = until[stop] - until[:stop]  # by the first used bin of a run: its counts
        candidates = best[:stop] + _xlogx(within.sum(-1)) - _xlogx(within).sum(-1) + _TABLE_BITS
        cut.append(int(np.argmin(candidates)))
        best[stop] = candidates[cut[-1]]
    runs, stop, last = [], len(used), BINS - 1
    while stop:
        first = int(used[cut[stop]]) if cut[stop] else 0
        runs.append((first, last))
        stop, last = cut[stop], first - 1
    return runs[::-1]


def _xlogx(counts: NDArray[Any]) -> NDArray[Any]:
    return counts * np.log2(np.maximum(counts, 1))


def merged_bins(classes: Sequence[CodeClass]) -> NDArray[np.uint8]:
    """For each bin the lowest one that is in the same class at every width: rows need to tell no more than that."""
    starts = np.zeros(BINS, np.uint8)
    for each in classes:
        starts[each.first_bin] = each.first_bin
    return np.maximum.accumulate(starts)


def class_table(classes: Sequence[CodeClass]) -> NDArray[np.uint16]:
    """The class of every width and bin, shape (17, B); an error if two claim one."""
    table = np.full((MAX_WIDTH + 1, BINS), NO_CLASS, np.uint16)
    for index, each in enumerate(classes):
        taken = table[each.width, each.first_bin : each.last_bin + 1]
        if (taken != NO_CLASS).any():
            raise PackedFileError(f"two models of {each.width} bits claim one bin")
        taken[:] = index
    return table
