"""Huffman codes of bytes as deflate blocks without matches (RFC 1951): threads code them in parallel.

They are read by the library isal where it is installed, about three times as fast as zlib reads the same bytes.
"""

import functools
import heapq
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError

_WINDOW_BITS = -15  # a raw stream, without a head and a checksum of its own
_BLOCK = 1 << 15  # zlib begins a new block, with a new table, after so many bytes
_MOST_MEMORY = 9  # zlib's highest level: the largest blocks
_HEAD_BITS, _LENGTH_BITS = 80, 3  # about what the table of a block takes, and the length of each code in it


def encode(data: NDArray[np.uint8]) -> bytes:
    """Code bytes by Huffman codes of their own.

    Args:
        data: uint8, shape (n,).

    Example:
        >>> data = np.arange(4000, dtype=np.uint8) % 4
        >>> len(encode(data)), decode(memoryview(encode(data)), 4000).tobytes() == data.tobytes()
        (1139, True)
    """
    coder = zlib.compressobj(zlib.Z_BEST_COMPRESSION, zlib.DEFLATED, _WINDOW_BITS, _MOST_MEMORY, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data.tobytes()) + coder.flush()


def decode(data: memoryview, size: int) -> NDArray[np.uint8]:
    """Undo :func:`encode`; never makes more than ``size`` bytes.

    Raises:
        PackedFileError: the stream is damaged, or does not hold ``size`` bytes, one or more.
    """
    reader = _reader()
    coder = reader.decompressobj(_WINDOW_BITS)
    try:
        found = coder.decompress(data, size)
        more = b"" if coder.eof else coder.decompress(coder.unconsumed_tail, 1)
    except reader.error as error:
        raise PackedFileError(f"a coded plane is damaged ({error})") from error
    if len(found) != size or more or not coder.eof or coder.unused_data:
        raise PackedFileError(f"a coded plane does not hold {size} bytes")
    return np.frombuffer(found, np.uint8)


@functools.cache
def _reader() -> Any:
    """The module that reads: isal's, or zlib, whose interface is the same."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


def expected_bits(shares: NDArray[np.float64], size: int) -> float:
    """About how long the code of ``size`` bytes is that have these shares.

    Example:
        >>> expected_bits(np.array([0.5, 0.25, 0.25]), 1000)
        1589.0
    """
    return size * _mean_length(shares) + (_HEAD_BITS + _LENGTH_BITS * len(shares)) * -(-size // _BLOCK)


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
