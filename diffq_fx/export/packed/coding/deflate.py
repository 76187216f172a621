"""Huffman codes of bytes as one deflate block (RFC 1951), so that zlib decodes them: in C, in parallel, and at several hundred MB/s.

zlib's own encoder sends a new table every 32768 bytes, which costs up to 0.6 % of a stream whose bytes are all drawn alike. So the block is
written here, with one table and without any matches.
"""

import heapq
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError

_LONGEST = 15
_END = 256  # the symbol that ends a block
_AT_ONCE = 1 << 20
_LENGTH_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
_ONE_DISTANCE = [1]  # a block must name a distance code, if only one that never comes
HEAD_BITS = 3 + 14 + 3 * len(_LENGTH_ORDER) + 4 * (_END + 1 + len(_ONE_DISTANCE))
"""What a block takes beside its symbols and their end: its head, and the length of every code in 4 bits."""


def encode(data: NDArray[np.uint8]) -> bytes:
    """Code bytes by a Huffman code of their own.

    Args:
        data: uint8, shape (n,).

    Example:
        >>> data = np.arange(4000, dtype=np.uint8) % 4
        >>> len(encode(data)), zlib.decompress(encode(data), -15) == data.tobytes()
        (1264, True)
    """
    lengths = np.array(_code_lengths([*np.bincount(data, minlength=_END).tolist(), 1]), np.uint8)
    codes = _canonical_codes(lengths)
    fields = [(1, 1), (2, 2), (0, 5), (0, 5), (len(_LENGTH_ORDER) - 4, 4)]  # last block, dynamic codes, how many of each
    fields += [(4 if length < 16 else 0, 3) for length in _LENGTH_ORDER]  # lengths 0 to 15 are coded by 4 bits each
    fields += [(int(_reversed(length, 4)), 4) for length in [*lengths.tolist(), *_ONE_DISTANCE]]
    bits = _Bits()
    bits.add(np.array([value for value, _ in fields], np.uint64), np.array([size for _, size in fields], np.uint64))
    for first in range(0, len(data), _AT_ONCE):
        some = data[first : first + _AT_ONCE]
        bits.add(codes[some], lengths[some].astype(np.uint64))
    bits.add(codes[_END:], lengths[_END:].astype(np.uint64))
    return bits.finish()


def decode(data: memoryview, size: int) -> NDArray[np.uint8]:
    """Undo :func:`encode`; never makes more than ``size`` bytes.

    Raises:
        PackedFileError: the block is damaged, or does not hold ``size`` bytes, one or more.
    """
    coder = zlib.decompressobj(-15)
    try:
        found = coder.decompress(data, size)
        more = b"" if coder.eof else coder.decompress(coder.unconsumed_tail, 1)
    except zlib.error as error:
        raise PackedFileError(f"a coded plane is damaged ({error})") from error
    if len(found) != size or more or not coder.eof or coder.unused_data:
        raise PackedFileError(f"a coded plane does not hold {size} bytes")
    return np.frombuffer(found, np.uint8)


def mean_length(shares: NDArray[np.float64]) -> float:
    """Mean length of the Huffman code of symbols with these shares: the sum of all nodes inside the tree.

    Example:
        >>> mean_length(np.array([0.5, 0.25, 0.25]))
        1.5
    """
    heap = shares.tolist()
    heapq.heapify(heap)
    total = float(len(heap) == 1)
    while len(heap) > 1:
        node = heapq.heappop(heap) + heap[0]
        heapq.heapreplace(heap, node)
        total += node
    return total


def _code_lengths(counts: Sequence[int]) -> list[int]:
    """Lengths of a Huffman code, none above 15; 0 for symbols that do not occur."""
    least = 1
    while True:
        heap: list[tuple[int, tuple[int, ...]]] = [(max(count, least), (symbol,)) for symbol, count in enumerate(counts) if count]
        heapq.heapify(heap)
        lengths = [0] * len(counts)
        while len(heap) > 1:
            (a, under_a), (b, under_b) = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in under_a + under_b:
                lengths[symbol] += 1
            heapq.heappush(heap, (a + b, under_a + under_b))
        if max(lengths) <= _LONGEST:
            return lengths
        least = max(2 * least, sum(counts) >> 20)  # rare symbols a little less rare: the tree becomes flatter


def _canonical_codes(lengths: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Codes in rising order of length and symbol, their first bit lowest."""
    codes, code, before = np.zeros(len(lengths), np.uint64), 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        if length := int(lengths[symbol]):
            code <<= length - before
            codes[symbol] = _reversed(code, length)
            code, before = code + 1, length
    return codes


def _reversed(code: int, length: int) -> int:
    return int(format(code, f"0{length}b")[::-1], 2)


class _Bits:
    """Writes numbers of few bits one after the other, from the low bits of each byte up."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._rest, self._size = 0, 0  # the bits that do not fill a word yet

    def add(self, values: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> None:
        """Add numbers of so many bits each, fewer than 64."""
        stops = np.cumsum(sizes, dtype=np.uint64) + np.uint64(self._size)
        starts = stops - sizes
        word, shift = (starts >> np.uint64(6)).astype(np.int64), starts & np.uint64(63)
        words = np.zeros(int(stops[-1] >> np.uint64(6)) + 1, np.uint64)
        firsts = np.flatnonzero(np.diff(word, prepend=-1))
        words[word[firsts]] = np.bitwise_or.reduceat(values << shift, firsts)
        over = np.flatnonzero(shift + sizes > np.uint64(64))  # at most one number crosses into each word
        words[word[over] + 1] |= values[over] >> (np.uint64(64) - shift[over])
        words[0] |= np.uint64(self._rest)
        self._rest, self._size = int(words[-1]), int(stops[-1]) & 63
        self._pieces.append(words[:-1].astype("<u8").tobytes())

    def finish(self) -> bytes:
        """Everything, filled up to a whole byte."""
        return b"".join(self._pieces) + self._rest.to_bytes(8, "little")[: -(-self._size // 8)]
