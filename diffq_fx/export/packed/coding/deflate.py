"""Huffman codes of bytes as a deflate stream without matches (RFC 1951): any inflater reads it, in parallel threads.

One block with one table holds a whole stream: zlib's own blocks, of 32768 bytes each, would take 0.1 % more. Streams are read by the
library isal where it is installed, about three times as fast as by zlib.
"""

import functools
import heapq
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding.huffman import BitWriter, code_lengths, codes_of

_WINDOW_BITS = -15  # a raw stream, without a head and a checksum of its own
_END = 256
"""The symbol that ends a block."""
_LONGEST, _LONGEST_OF_HEAD = 15, 7
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
"""In which the lengths of the codes of the head's own symbols come."""
_AT_ONCE = 1 << 17
"""Bytes that are coded or read at once."""
_HEAD_BITS, _LENGTH_BITS = 100, 3  # about what a table takes, and the length of each code in it


def encode(data: NDArray[np.uint8]) -> bytes:
    """Code bytes by Huffman codes of their own.

    Args:
        data: uint8, shape (n,).

    Example:
        >>> data = np.arange(4000, dtype=np.uint8) % 4
        >>> len(encode(data)), decode(memoryview(encode(data)), 4000).tobytes() == data.tobytes()
        (1139, True)
    """
    counts = np.bincount(data, minlength=_END + 1)
    counts[_END] = 1
    lengths = code_lengths(counts, _LONGEST)
    codes, bits = codes_of(lengths), BitWriter()
    _write_head(bits, lengths)
    for first in range(0, len(data), _AT_ONCE):
        some = data[first : first + _AT_ONCE]
        bits.add_all(codes[some], lengths[some])
    bits.add_all(codes[_END:], lengths[_END:])
    return bits.end()


def _write_head(bits: BitWriter, lengths: NDArray[np.uint8]) -> None:
    """The head of a last block with codes of its own, and the lengths of these."""
    runs = [*_runs((*lengths.tolist(), 1, 1))]  # and two distances, which nothing refers to
    counts = np.bincount([symbol for symbol, _, _ in runs], minlength=len(_ORDER))
    if np.count_nonzero(counts) == 1:
        counts[int(not counts.argmax())] = 1
    heads = code_lengths(counts, _LONGEST_OF_HEAD)
    codes, number = codes_of(heads), max(place for place, symbol in enumerate(_ORDER) if heads[symbol]) + 1
    for value, length in ((1, 1), (2, 2), (0, 5), (1, 5), (max(number, 4) - 4, 4)):
        bits.add(value, length)
    for symbol in _ORDER[: max(number, 4)]:
        bits.add(int(heads[symbol]), 3)
    for symbol, value, length in runs:
        bits.add(int(codes[symbol]), int(heads[symbol]))
        if length:
            bits.add(value, length)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Lengths as symbols of deflate's head: a length, or 17 or 18 for zeros; then a number of so many bits.

    Example:
        >>> list(_runs([3, 0, 0, 0, 2, *[0] * 140]))
        [(3, 0, 0), (17, 0, 3), (2, 0, 0), (18, 127, 7), (0, 0, 0), (0, 0, 0)]
    """
    at = 0
    while at < len(lengths):
        zeros = 0
        while at + zeros < len(lengths) and not lengths[at + zeros] and zeros < 138:
            zeros += 1
        yield (lengths[at], 0, 0) if zeros < 3 else (17, zeros - 3, 3) if zeros < 11 else (18, zeros - 11, 7)
        at += zeros if zeros >= 3 else 1


def decode(data: memoryview, size: int) -> NDArray[np.uint8]:
    """Undo :func:`encode`; never makes more than ``size`` bytes.

    Raises:
        PackedFileError: the stream is damaged, or does not hold ``size`` bytes, one or more.
    """
    reader, found, at = _reader(), np.empty(size, np.uint8), 0
    coder = reader.decompressobj(_WINDOW_BITS)
    try:
        for first in range(0, len(data), _AT_ONCE):  # a buffer that grows to the whole would be copied, and take twice its room
            given = data[first : first + _AT_ONCE]
            while len(given):
                piece = coder.decompress(given, size - at + 1)
                if at + len(piece) > size or coder.unused_data or (coder.eof and first + _AT_ONCE < len(data)):
                    raise PackedFileError(f"a coded plane does not hold {size} bytes")
                found[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at, given = at + len(piece), coder.unconsumed_tail
    except reader.error as error:
        raise PackedFileError(f"a coded plane is damaged ({error})") from error
    if at != size or not coder.eof:
        raise PackedFileError(f"a coded plane does not hold {size} bytes")
    return found


@functools.cache
def _reader() -> Any:
    """The module that reads: isal's, or zlib, whose interface is the same."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


def expected_bits(shares: NDArray[np.float64], size: int) -> float:
    """About how long the code of ``size`` bytes is, whose values have these shares.

    Example:
        >>> expected_bits(np.array([0.5, 0.25, 0.25, 0.0]), 1000)
        1609.0
    """
    some = shares[shares > 0]
    return size * _mean_length(some) + _HEAD_BITS + _LENGTH_BITS * len(some)


def _mean_length(shares: NDArray[np.float64]) -> float:
    """Mean length of a Huffman code: the sum of all nodes inside its tree."""
    heap = shares.tolist()
    heapq.heapify(heap)
    total = float(len(heap) == 1)
    while len(heap) > 1:
        node = heapq.heappop(heap) + heap[0]
        heapq.heapreplace(heap, node)
        total += node
    return total
