"""Interleaved rANS: an entropy coder whose inner loop runs over thousands of lanes at once, in numpy.

rANS is "Asymmetric numeral systems" (Duda, arXiv:1311.2540) in its range form. A lane is one coder state of 32 bits, renormalized by
words of 16 bits; all lanes share one sequence of words. Symbols of several streams, each with its own frequencies, are spread over the
lanes: lane k of a stream with n_k lanes holds its symbols k, k + n_k, k + 2 n_k, ... At every step each lane gives one symbol.

Lanes with more symbols come first, so the lanes that are still active are always a prefix. Legend: S streams, L lanes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError

SYMBOL_BITS = 6
"""Symbols are 0 to 63."""
PRECISION = 12
"""The frequencies of a stream sum to ``2^12``."""
LOWEST = 1 << 16
"""States lie in ``[2^16, 2^32)``."""
MAX_STEPS = 4096
"""Symbols of one lane."""

_TOTAL = 1 << PRECISION
_SYMBOLS = 1 << SYMBOL_BITS
_U32 = np.uint32

_STEPS_AT_ONCE = 32  # symbols are cut out of the table's entries of several steps together

_DECODING = Lock()  # the loop is many short numpy calls: two of them at once only fight for the interpreter


@dataclass(frozen=True)
class Lanes:
    """How the symbols of streams lie in lanes; a function of their counts and of the longest lane alone."""

    counts: tuple[int, ...]
    length: NDArray[np.int64]
    """Symbols in each lane of a stream, shape (S,); the last ones of the longest may be padding."""
    number: NDArray[np.int64]
    """Lanes of each stream, shape (S,)."""
    first: NDArray[np.int64]
    """First lane of each stream, shape (S,)."""

    @staticmethod
    def of(counts: Sequence[int], steps: int) -> "Lanes":
        """Spread streams over as few lanes as hold them at ``steps`` symbols each.

        Example:
            >>> lanes = Lanes.of([10, 3], steps=4)
            >>> lanes.number.tolist(), lanes.length.tolist(), lanes.first.tolist()
            ([3, 1], [4, 3], [0, 3])
        """
        count = np.asarray(counts, np.int64).reshape(-1)
        number = -(-count // steps)
        length = -(-count // np.maximum(number, 1))
        order = np.argsort(-length, kind="stable")
        first = np.empty_like(count)
        first[order] = np.cumsum(number[order]) - number[order]
        return Lanes(tuple(count.tolist()), length, number, first)

    @property
    def total(self) -> int:
        """Number of lanes."""
        return int(self.number.sum())

    @property
    def steps(self) -> int:
        """Symbols in the longest lane."""
        return int(self.length.max(initial=0))

    def stream_of_lane(self) -> NDArray[np.int64]:
        """The stream that each lane belongs to, shape (L,)."""
        order = np.argsort(self.first + (self.number == 0) * self.total, kind="stable")
        return np.repeat(order, self.number[order])

    def active(self) -> list[int]:
        """Number of lanes that have a symbol at each step."""
        per_lane = self.length[self.stream_of_lane()]
        return [int(n) for n in np.searchsorted(-per_lane, -np.arange(self.steps), side="left")]


def encode(
    streams: Sequence[NDArray[np.uint8]], frequencies: Sequence[NDArray[np.uint32]], lanes: Lanes, hidden: NDArray[np.uint16]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Code symbols.

    Args:
        streams: symbols of each stream, shape (n,), of the lengths that ``lanes`` was made for.
        frequencies: of each stream, uint32, shape (64,), summing to ``2^12``, positive for every symbol of the stream.
        lanes: where the symbols lie.
        hidden: at most one word per lane that comes back from :func:`decode`; it costs next to nothing, as a coder has to start in
            some state.

    Returns:
        The states that decoding starts with, shape (L,), and the words, in the order of reading.

    Example:
        >>> symbols, lanes = [np.array([0, 1, 1, 0, 1], np.uint8)], Lanes.of([5], steps=5)
        >>> frequencies = [np.pad(np.array([1024, 3072], np.uint32), (0, 62))]
        >>> states, words = encode(symbols, frequencies, lanes, np.zeros(0, np.uint16))
        >>> decode(states, words, frequencies, lanes)[0]
        [array([0, 1, 1, 0, 1], dtype=uint8)]
    """
    if not lanes.total:
        return np.zeros(0, _U32), np.zeros(0, np.uint16)
    grid = _grid_of(streams, frequencies, lanes)
    frequency = np.concatenate([np.asarray(f, _U32) for f in frequencies])
    cumulative = np.concatenate([np.cumsum(f, dtype=_U32) - np.asarray(f, _U32) for f in frequencies])
    row = lanes.stream_of_lane() * _SYMBOLS
    state = np.full(lanes.total, LOWEST, _U32)
    state[: len(hidden)] += hidden
    words: list[NDArray[np.uint16]] = []
    for step, active in reversed(list(enumerate(lanes.active()))):
        index = row[:active] + grid[step, :active]
        x, f = state[:active], frequency[index]
        full = np.flatnonzero((x >> _U32(32 - PRECISION)) >= f)
        words.append(x[full].astype(np.uint16))
        x[full] >>= _U32(16)
        quotient = x // f
        x[:] = (quotient << _U32(PRECISION)) + (x - quotient * f) + cumulative[index]
    return state, np.concatenate(words[::-1])


def _grid_of(streams: Sequence[NDArray[np.uint8]], frequencies: Sequence[NDArray[np.uint32]], lanes: Lanes) -> NDArray[np.uint8]:
    """Symbols as (steps, L), free places filled with the cheapest symbol of their stream."""
    grid = np.zeros((lanes.steps, lanes.total), np.uint8)
    for stream, symbols in enumerate(streams):
        length, number, first = int(lanes.length[stream]), int(lanes.number[stream]), int(lanes.first[stream])
        filler = np.full(length * number - len(symbols), np.argmax(frequencies[stream]), np.uint8)
        grid[:length, first : first + number] = np.concatenate([symbols, filler]).reshape(length, number)
    return grid


def decode(
    states: NDArray[np.uint32], words: NDArray[np.uint16], frequencies: Sequence[NDArray[np.uint32]], lanes: Lanes
) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint16]]:
    """Undo :func:`encode`.

    Args:
        states: shape (L,).
        words: in the order of reading; all of them must be read.
        frequencies: as given to :func:`encode`; checked by :func:`check_frequencies`.
        lanes: as given to :func:`encode`.

    Returns:
        The symbols of each stream, and one hidden word per lane.

    Raises:
        PackedFileError: the words and the states do not belong together.
    """
    if lanes.total and int(states.min()) < LOWEST:
        raise PackedFileError("a coder state is out of range")
    with _DECODING:
        grid, final, read = _decode_grid(states.copy(), words, _table(frequencies), lanes)
    if read != len(words):
        raise PackedFileError(f"the coded levels end after {read} of {len(words)} words")
    if lanes.total and int(final.max()) >= 2 * LOWEST:
        raise PackedFileError("the coded levels end in a wrong state")
    return _streams_of(grid, lanes), (final - _U32(LOWEST)).astype(np.uint16)


def _table(frequencies: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """One entry per slot of every stream: ``symbol << 25 | (slot - cumulative) << 13 | frequency``."""
    entries = [np.zeros(0, _U32)]
    for f in frequencies:
        symbol = np.repeat(np.arange(len(f), dtype=_U32), f)
        start = np.cumsum(f, dtype=_U32) - np.asarray(f, _U32)
        place = np.arange(_TOTAL, dtype=_U32) - start[symbol]
        entries.append((symbol << _U32(2 * PRECISION + 1)) | (place << _U32(PRECISION + 1)) | np.asarray(f, _U32)[symbol])
    return np.concatenate(entries)


def _decode_grid(
    state: NDArray[np.uint32], words: NDArray[np.uint16], table: NDArray[np.uint32], lanes: Lanes
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], int]:
    """Decode step by step: symbols as (steps, L), the final states, and how many words were read."""
    slot_mask, frequency_mask = _U32(_TOTAL - 1), _U32(2 * _TOTAL - 1)
    precision, next_field, lowest, symbol = _U32(PRECISION), _U32(PRECISION + 1), _U32(LOWEST), _U32(2 * PRECISION + 1)
    low, high = state.view(np.uint16)[::2], state.view(np.uint16)[1::2]
    base = (lanes.stream_of_lane() << PRECISION).astype(_U32)
    field, slot, hungry = np.empty_like(state), np.empty(len(state), np.int64), np.empty(len(state), np.bool_)
    entries = np.zeros((_STEPS_AT_ONCE, len(state)), _U32)
    grid = np.empty((lanes.steps, lanes.total), np.uint8)
    read, width, x = 0, -1, state
    for step, active in enumerate(lanes.active()):
        if active != width:
            width, x, high, base = active, state[:active], high[:active], base[:active]
            field, slot, hungry = field[:active], slot[:active], hungry[:active]
        entry = entries[step % _STEPS_AT_ONCE, :active]
        np.bitwise_and(x, slot_mask, out=field)
        np.bitwise_or(field, base, out=field)
        slot[:] = field
        table.take(slot, None, entry, "wrap")
        np.bitwise_and(entry, frequency_mask, out=field)
        np.right_shift(x, precision, out=x)
        np.multiply(x, field, out=x)
        np.right_shift(entry, next_field, out=field)
        np.bitwise_and(field, slot_mask, out=field)
        np.add(x, field, out=x)
        np.less(x, lowest, out=hungry)
        fed = hungry.nonzero()[0]
        food = words[read : read + len(fed)]
        if len(food) < len(fed):
            raise PackedFileError("the coded levels end early")
        high[fed] = low[fed]  # x = x << 16 | word, for an x below 2^16
        low[fed] = food
        read += len(fed)
        if (step + 1) % _STEPS_AT_ONCE == 0 or step + 1 == lanes.steps:
            first = step - step % _STEPS_AT_ONCE
            grid[first : step + 1] = entries[: step + 1 - first] >> symbol
    return grid, state, read


def _streams_of(grid: NDArray[np.uint8], lanes: Lanes) -> list[NDArray[np.uint8]]:
    streams = []
    for count, length, number, first in zip(lanes.counts, lanes.length, lanes.number, lanes.first, strict=True):
        streams.append(grid[:length, first : first + number].reshape(-1)[:count])
    return streams


def check_frequencies(frequencies: NDArray[np.uint32]) -> None:
    """Refuse frequencies, shape (S, 64), that no table can be made of.

    Raises:
        PackedFileError: those of a stream do not sum to ``2^12``.
    """
    if frequencies.size and (frequencies.astype(np.int64).sum(1) != _TOTAL).any():
        raise PackedFileError(f"the frequencies of a stream do not sum to {_TOTAL}")


def frequencies_of(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Round counts to frequencies that sum to ``2^12``, none of them zero where the count is not, and none of them all.

    Args:
        counts: shape (64,), with at least one that is not zero.

    Returns:
        uint32, shape (64,), each below ``2^12``, so that it fits 12 bits.

    Example:
        >>> frequencies_of(np.pad(np.array([1, 10000, 30000]), (0, 61)))[:4].tolist()
        [1, 1024, 3071, 0]
    """
    if np.count_nonzero(counts) == 1:
        alone = int(np.argmax(counts))
        counts = counts.copy()
        counts[alone] = _TOTAL * _TOTAL
        counts[alone ^ 1] = 1  # in every alphabet that holds the other
    exact = counts * (_TOTAL / counts.sum())
    frequency = np.maximum(np.floor(exact), counts > 0).astype(np.int64)
    missing = _TOTAL - int(frequency.sum())
    if missing > 0:  # at most one for each symbol
        frequency[np.argsort(frequency - exact, kind="stable")[:missing]] += 1
    while missing < 0:
        largest = int(np.argmax(frequency))
        taken = min(-missing, int(frequency[largest]) // 2)
        frequency[largest] -= taken
        missing += taken
    return frequency.astype(_U32)
