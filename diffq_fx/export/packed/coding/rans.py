"""Interleaved rANS: an entropy coder of bytes whose inner loop runs over many lanes at once, in numpy.

rANS is "Asymmetric numeral systems" (Duda, arXiv:1311.2540) in its range form. A lane is one coder state of 32 bits, renormalized by
words of 16 bits; all lanes share one sequence of words. Symbol i lies in lane ``i mod lanes``: at every step each lane gives one symbol.

The bytes of a coded sequence (little endian) are::

    last         u8        highest symbol that has a frequency
    words        u32       number of words
    frequencies  12 bits   of the symbols 0 to last, bit-packed; they sum to 4096
    states       u32       one for each lane
    words        u16

Legend: L lanes, S steps.
"""

import struct
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding.bitplanes import pack, packed_size, unpack

PRECISION = 12
"""The frequencies sum to ``2^12``."""
STEPS = 2048
"""Symbols of one lane, at most. A lane costs 4 bytes, and the more there are, the faster it goes."""
LEAST = 1 << 15
"""Symbols below which there are too few lanes to be worth it."""

_LOWEST = 1 << 16  # states lie in [2^16, 2^32)
_TOTAL = 1 << PRECISION
_U32 = np.uint32
_HEAD = struct.Struct("<BI")
_DECODING = Lock()  # the loop is many short numpy calls: two of them at once only fight for the interpreter


def encode(symbols: NDArray[np.uint8]) -> bytes:
    """Code symbols at their order-0 entropy.

    Args:
        symbols: uint8, shape (n,), at least 32768 of them.

    Example:
        >>> symbols = np.arange(32768, dtype=np.uint8) % 4
        >>> len(encode(symbols)), bool((decode(memoryview(encode(symbols)), 32768) == symbols).all())
        (8267, True)
    """
    frequency = frequencies_of(np.bincount(symbols, minlength=256))
    lanes, steps = _lanes(len(symbols))
    filler = np.full(lanes * steps - len(symbols), np.argmax(frequency), np.uint8)  # the cheapest symbol
    grid_SL = np.concatenate([symbols, filler]).reshape(steps, lanes)
    cumulative = np.cumsum(frequency, dtype=_U32) - frequency
    state = np.full(lanes, _LOWEST, _U32)
    words: list[NDArray[np.uint16]] = []
    for symbol in grid_SL[::-1]:
        f = frequency[symbol]
        full = np.flatnonzero((state >> _U32(32 - PRECISION)) >= f)
        words.append(state[full].astype(np.uint16))
        state[full] >>= _U32(16)
        quotient = state // f
        state = (quotient << _U32(PRECISION)) + (state - quotient * f) + cumulative[symbol]
    coded, last = np.concatenate(words[::-1]), int(np.flatnonzero(frequency)[-1])
    table = pack(frequency[: last + 1].astype(np.uint16), PRECISION)
    return _HEAD.pack(last, len(coded)) + table + state.astype("<u4").tobytes() + coded.astype("<u2").tobytes()


def decode(data: memoryview, count: int) -> NDArray[np.uint8]:
    """Undo :func:`encode`.

    Args:
        data: exactly the coded sequence.
        count: symbols in it, at least 32768.

    Raises:
        PackedFileError: the sequence is damaged or of another length.
    """
    if count < LEAST or len(data) < _HEAD.size:
        raise PackedFileError(f"{count} symbols in {len(data)} bytes cannot be coded so")
    last, words = _HEAD.unpack(data[: _HEAD.size])
    lanes, steps = _lanes(count)
    states_at = _HEAD.size + packed_size(last + 1, PRECISION)
    words_at = states_at + 4 * lanes
    if words_at + 2 * words != len(data):
        raise PackedFileError(f"a coded sequence has {len(data)} bytes, its head says {words_at + 2 * words}")
    table = _table(unpack(data[_HEAD.size : states_at], PRECISION, last + 1).astype(_U32))
    state = np.frombuffer(data[states_at:words_at], "<u4").astype(_U32)
    if int(state.min()) < _LOWEST:
        raise PackedFileError("a coder state is out of range")
    with _DECODING:
        grid_SL, read = _decode_grid(state, np.frombuffer(data[words_at:], "<u2"), table, steps)
    if read != words or (state != _LOWEST).any():
        raise PackedFileError("the coded levels end in a wrong state")
    return grid_SL.reshape(-1)[:count]


def _lanes(count: int) -> tuple[int, int]:
    """Lanes, and symbols in each of them."""
    lanes = -(-count // STEPS)
    return lanes, -(-count // lanes)


def _table(frequency: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """One entry for each slot: ``symbol << 24 | (slot - start) << 12 | frequency``.

    Raises:
        PackedFileError: the frequencies do not sum to ``2^12``.
    """
    if int(frequency.sum()) != _TOTAL or int(frequency.max()) >= _TOTAL:
        raise PackedFileError(f"the frequencies of a coder do not sum to {_TOTAL}")
    symbol = np.repeat(np.arange(len(frequency), dtype=_U32), frequency)
    start = np.cumsum(frequency, dtype=_U32) - frequency
    place = np.arange(_TOTAL, dtype=_U32) - start[symbol]
    return (symbol << _U32(2 * PRECISION)) | (place << _U32(PRECISION)) | frequency[symbol]


def _decode_grid(
    state: NDArray[np.uint32], words: NDArray[np.uint16], table: NDArray[np.uint32], steps: int
) -> tuple[NDArray[np.uint8], int]:
    """Decode step by step, in place of ``state``: symbols as (S, L), and how many words were read."""
    mask, precision, lowest, symbol = _U32(_TOTAL - 1), _U32(PRECISION), _U32(_LOWEST), _U32(2 * PRECISION)
    low, high = state.view(np.uint16)[::2], state.view(np.uint16)[1::2]
    field, entry, slot, hungry = np.empty_like(state), np.empty_like(state), np.empty(len(state), np.int64), np.empty(len(state), np.bool_)
    grid_SL = np.empty((steps, len(state)), np.uint8)
    read = 0
    for row in grid_SL:
        slot[:] = np.bitwise_and(state, mask, out=field)
        table.take(slot, None, entry, "wrap")
        np.right_shift(state, precision, out=state)
        np.bitwise_and(entry, mask, out=field)
        np.multiply(state, field, out=state)
        np.right_shift(entry, precision, out=field)
        np.bitwise_and(field, mask, out=field)
        np.add(state, field, out=state)
        np.right_shift(entry, symbol, out=entry)
        row[:] = entry
        fed = np.less(state, lowest, out=hungry).nonzero()[0]
        food = words[read : read + len(fed)]
        if len(food) < len(fed):
            raise PackedFileError("the coded levels end early")
        high[fed] = low[fed]  # state = state << 16 | word, for a state below 2^16
        low[fed] = food
        read += len(fed)
    return grid_SL, read


def frequencies_of(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Round counts to frequencies that sum to ``2^12``, none of them zero where the count is not, and none of them all.

    Args:
        counts: shape (256,), with at least one that is not zero.

    Returns:
        uint32, shape (256,), each below ``2^12``, so that it fits 12 bits.

    Example:
        >>> frequencies_of(np.pad(np.array([1, 10000, 30000]), (0, 253)))[:4].tolist()
        [1, 1024, 3071, 0]
    """
    if np.count_nonzero(counts) == 1:
        alone = int(np.argmax(counts))
        counts = counts.copy()
        counts[alone] = _TOTAL * _TOTAL
        counts[alone ^ 1] = 1
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
