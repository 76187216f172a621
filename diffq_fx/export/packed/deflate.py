"""Huffman codes of bytes as a raw deflate stream without matches (RFC 1951): any inflater reads it, in parallel threads.

zlib writes it (``Z_HUFFMAN_ONLY``). Streams are read by the library isal where it is installed, about three times as fast as by zlib.
"""

import heapq
import zlib

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.kernels.checksum import fast_zlib

_WINDOW_BITS = -15  # a raw stream, without a head and a checksum of its own
_MOST_MEMORY = 9  # zlib's longest blocks, each with a table of its own
_BLOCK = 1 << 15  # bytes of such a block
_AT_ONCE = 1 << 17  # bytes that are read at once
_HEAD_BITS, _LENGTH_BITS = 100, 3  # about what a table takes, and the length of each code in it


def encode(data: NDArray[np.uint8]) -> bytes:
    """Code bytes, uint8 of shape (n,), by Huffman codes of their own."""
    coder = zlib.compressobj(wbits=_WINDOW_BITS, memLevel=_MOST_MEMORY, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(np.ascontiguousarray(data).data) + coder.flush()


def decode(data: memoryview, size: int) -> NDArray[np.uint8]:
    """Undo :func:`encode`; an error if ``data`` is damaged, or not exactly ``size`` bytes, more of which are never made."""
    reader, found, at = fast_zlib(), np.empty(size, np.uint8), 0
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


def estimated_bits(shares: NDArray[np.float64], size: int) -> float:
    """About how long the code of ``size`` bytes is, whose values have these shares."""
    some = shares[shares > 0]
    return size * _mean_length(some) + -(-size // _BLOCK) * (_HEAD_BITS + _LENGTH_BITS * len(some))


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
