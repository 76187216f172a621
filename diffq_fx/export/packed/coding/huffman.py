"""Huffman codes in the form that deflate gives them (RFC 1951, 3.2.2), and their bits in a row."""

import heapq

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1 << 18
"""Symbols whose bits are joined at once."""


def code_lengths(counts: NDArray[np.int64], longest: int) -> NDArray[np.uint8]:
    """Bits of each symbol's code, 0 for those that do not occur. Two symbols or more must occur.

    Args:
        counts: how often each symbol occurs, shape (n,).
        longest: bits that no code exceeds; counts are evened out until none does.

    Example:
        >>> code_lengths(np.array([5, 1, 0, 1, 2]), 15).tolist()
        [1, 3, 0, 3, 2]
    """
    present = np.flatnonzero(counts)
    weights = counts[present]
    while True:
        depths = _depths(weights.tolist())
        if max(depths) <= longest:
            break
        weights = weights // 2 + 1
    lengths = np.zeros(len(counts), np.uint8)
    lengths[present] = depths
    return lengths


def _depths(weights: list[int]) -> list[int]:
    """Depth of each leaf of the Huffman tree of these weights, two or more."""
    heap = [(weight, index) for index, weight in enumerate(weights)]
    heapq.heapify(heap)
    parent = [0] * (2 * len(weights) - 1)
    for node in range(len(weights), len(parent)):
        first = heapq.heappop(heap)
        second = heapq.heapreplace(heap, (first[0] + heap[0][0], node))
        parent[first[1]] = parent[second[1]] = node
    depth = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[: len(weights)]


def codes_of(lengths: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The canonical codes of these lengths, first bit lowest, as deflate writes them.

    Example:
        >>> codes_of(np.array([1, 3, 0, 3, 2], np.uint8)).tolist()
        [0, 3, 0, 7, 1]
    """
    codes, code, before = np.zeros(len(lengths), np.uint64), 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)).tolist():
        length = int(lengths[symbol])
        if length:
            code <<= length - before
            codes[symbol] = int(format(code, f"0{length}b")[::-1], 2)
            code, before = code + 1, length
    return codes


class BitWriter:
    """Bits one after the other, the first one the lowest of the first byte."""

    def __init__(self) -> None:
        self._words: list[NDArray[np.uint32]] = []
        self._rest, self._used = 0, 0  # bits that do not fill a word yet

    def add(self, value: int, length: int) -> None:
        """Add one number of up to 32 bits."""
        self._rest |= value << self._used
        self._used += length
        if self._used >= 32:
            self._words.append(np.array([self._rest & 0xFFFFFFFF], np.uint32))
            self._rest, self._used = self._rest >> 32, self._used - 32

    def add_all(self, codes: NDArray[np.uint64], lengths: NDArray[np.uint8]) -> None:
        """Add many codes of 1 to 32 bits."""
        for first in range(0, len(codes), _AT_ONCE):
            self._join(codes[first : first + _AT_ONCE], lengths[first : first + _AT_ONCE])

    def _join(self, codes: NDArray[np.uint64], lengths: NDArray[np.uint8]) -> None:
        stops = np.cumsum(lengths, dtype=np.int64) + self._used
        starts = stops - lengths
        shifted = codes << (starts & 31).astype(np.uint64)
        word = starts >> 5
        firsts = np.flatnonzero(np.diff(word, prepend=-1))  # codes are shorter than a word, so one begins in each word but the last
        joined = np.bitwise_or.reduceat(shifted, firsts)
        words = np.zeros(int(word[-1]) + 2, np.uint64)
        words[word[firsts]] = joined & np.uint64(0xFFFFFFFF)
        words[word[firsts] + 1] |= joined >> np.uint64(32)
        words[0] |= np.uint64(self._rest)
        whole, self._used = int(stops[-1]) >> 5, int(stops[-1]) & 31
        self._words.append(words[:whole].astype("<u4"))
        self._rest = int(words[whole])

    def end(self) -> bytes:
        """All bits, zeros after the last one up to a whole byte."""
        return b"".join(each.tobytes() for each in self._words) + self._rest.to_bytes(4, "little")[: -(-self._used // 8)]
