"""Streams of unsigned values as bytes: bit-packed, or with their high bits entropy coded.

The low bits of a stream, which hardly ever tell anything, stay as they are. Its high bits are packed into bytes as one bit plane (of 1,
2, 4 or 8 bits, so that a byte holds 8 to 1 values), and these bytes go through a coder. Which bits are low, and which coder, is chosen
by the length of the outcome.

=====  =======  =============================================================================================================
coder  name     what it does
=====  =======  =============================================================================================================
0      stored   nothing is coded: every bit is low
1      deflate  Huffman codes: fast, and mostly within 1 % of the entropy
2      ans      at the entropy, several times slower, one thread at a time; taken where it saves more than 1.2 %
=====  =======  =============================================================================================================

A block of streams, whose widths and counts the reader knows, is for each stream that is not empty (little endian)::

    coder  u8
    low    u8      low bits of a value
    plane  u8      bits that a value takes in the plane of the high bits
    size   u32     bytes of the coded plane
    the coded plane
    the low bits, bit-packed
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding import ans, deflate
from diffq_fx.export.packed.coding.bitplanes import Values, pack, pack_plane, packed_size, planes_of, unpack, unpack_plane
from diffq_fx.kernels.unpacking import Plane

STORED, DEFLATE, ANS = 0, 1, 2

_HEAD = struct.Struct("<BBBI")
_WORTH_IT = 0.99
"""Coding must bring a stream below this share of its size."""
_WORTH_THE_TIME = 0.988
"""The slower coder must bring a stream below this share of its Huffman codes."""
_FEW = 64
"""Values below which coding does not pay."""
_AT_ONCE = 1 << 17
"""Values that are unpacked at once."""
_CODERS = {DEFLATE: deflate, ANS: ans}


@dataclass(frozen=True)
class Stream:
    """Values of one width."""

    width: int
    values: Values

    @property
    def count(self) -> int:
        """Number of values."""
        return len(self.values)


@dataclass(frozen=True)
class _Cut:
    """A way to code a stream, and about how long it makes it."""

    coder: int
    low: int
    plane: int
    bits: float


def encode_block(streams: Sequence[Stream], *, entropy: bool) -> bytes:
    """Encode streams.

    Args:
        streams: any number of them, the empty ones too.
        entropy: False packs every stream at its width.

    Example:
        >>> values = np.array([0, 1, 0, 0] * 1000, np.uint8)
        >>> len(encode_block([Stream(3, values)], entropy=False)), len(encode_block([Stream(3, values)], entropy=True))
        (1507, 252)
    """
    return b"".join(_encode(stream, entropy) for stream in streams if stream.count)


def _encode(stream: Stream, entropy: bool) -> bytes:
    stored = _Cut(STORED, stream.width, 0, stream.width * stream.count)
    cut = _best_cut(stream, stored) if entropy and stream.count >= _FEW else stored
    coded = b""
    if cut.coder != STORED:
        plane = np.frombuffer(pack_plane((stream.values >> cut.low).astype(np.uint8), cut.plane), np.uint8)
        coded = _CODERS[cut.coder].encode(plane)
    return _HEAD.pack(cut.coder, cut.low, cut.plane, len(coded)) + coded + pack(stream.values, cut.low)


def _best_cut(stream: Stream, stored: _Cut) -> _Cut:
    """The shortest way to code a stream, a faster one where it is nearly as short."""
    counts, lowest = np.bincount(stream.values, minlength=1 << stream.width), max(stream.width - 8, 0)
    best = min((_cut(DEFLATE, counts, stream.width, low) for low in range(lowest, stream.width)), key=lambda cut: cut.bits)
    best = best if best.bits < _WORTH_IT * stored.bits else stored
    exact = _cut(ANS, counts, stream.width, lowest)
    return exact if exact.bits < _WORTH_THE_TIME * best.bits else best


def _cut(coder: int, counts: NDArray[np.int64], width: int, low: int) -> _Cut:
    number = int(counts.sum())
    plane = next(bits for bits in (1, 2, 4, 8) if bits >= width - low)
    high = counts.reshape(-1, 1 << low).sum(1) / number
    symbols = high
    for _ in range(8 // plane - 1):  # values far from each other share a byte: take them for independent
        symbols = np.multiply.outer(symbols, high).reshape(-1)
    bits = _CODERS[coder].expected_bits(symbols[symbols > 0], -(-number * plane // 8))
    return _Cut(coder, low, plane, bits + low * number)


class DecodedStream:
    """A stream of a block that has been decoded: its values can be had piece by piece, and until then take little room."""

    def __init__(self, width: int, count: int, low: int, plane: int, high_bytes: NDArray[np.uint8] | None, low_bytes: memoryview) -> None:
        self.count = count
        self._width = width
        self._low = low
        self._plane = plane
        self._high_bytes = high_bytes
        self._low_bytes = low_bytes

    def planes(self) -> list[Plane]:
        """The bit planes that make its values."""
        low, at, found = np.frombuffer(self._low_bytes, np.uint8), 0, []
        for first, bits in planes_of(self._low):
            size = -(-self.count * bits // 8)
            found.append(Plane(low[at : at + size], bits, first))
            at += size
        return found if self._high_bytes is None else [*found, Plane(self._high_bytes, self._plane, self._low)]

    def reading(self) -> "_Reading":
        """A reader of the values, from the first one on."""
        return _Reading(self)

    def values(self, some: slice = slice(None)) -> Values:
        """The values or some of them, made anew at each call: uint8 up to 8 bits, else uint16."""
        kind = np.uint8 if self._width <= 8 else np.uint16
        if self._high_bytes is None:
            return unpack(self._low_bytes, self._width, self.count, some)
        high = unpack_plane(self._high_bytes, self._plane, self.count, some).astype(kind, copy=False)
        if not self._low:
            return high
        values = high << kind(self._low)
        values |= unpack(self._low_bytes, self._low, self.count, some).astype(kind, copy=False)
        return values


class _Reading:
    """Takes the values of a stream in order. They are unpacked many at once: small calls of numpy keep other threads from theirs."""

    def __init__(self, stream: DecodedStream) -> None:
        self._stream = stream
        self._values = stream.values(slice(0))
        self._at, self._next = 0, 0

    def take(self, count: int) -> Values:
        """The next values."""
        if self._at + count > len(self._values):
            first = self._next - len(self._values) + self._at
            self._next = first + max(count, _AT_ONCE)
            self._values, self._at = self._stream.values(slice(first, self._next)), 0
            self._next = first + len(self._values)
        self._at += count
        return self._values[self._at - count : self._at]


def decode_block(data: memoryview, expected: Sequence[tuple[int, int]]) -> list[DecodedStream]:
    """Undo :func:`encode_block`.

    Args:
        data: exactly the block.
        expected: width and count of each stream.

    Returns:
        The streams.

    Raises:
        PackedFileError: the block is damaged, or not of these streams.
    """
    streams, reader = [], _Reader(data)
    for width, count in expected:
        streams.append(_decode(reader, width, count) if count else DecodedStream(width, 0, width, 0, None, memoryview(b"")))
    reader.end()
    return streams


def _decode(reader: "_Reader", width: int, count: int) -> DecodedStream:
    coder, low, plane, size = _HEAD.unpack(reader.take(_HEAD.size))
    possible = (low == width and plane == size == 0) if coder == STORED else (plane in (1, 2, 4, 8) and 0 < width - low <= plane)
    if coder > ANS or not possible:
        raise PackedFileError(f"a stream of {width} bits has a damaged head: coder {coder}, {low} low bits, plane of {plane}")
    coded, low_bytes = reader.take(size), reader.take(packed_size(count, low))
    if coder == STORED:
        return DecodedStream(width, count, low, plane, None, low_bytes if reader.is_mostly(low_bytes) else memoryview(bytes(low_bytes)))
    high_bytes = -(-count * plane // 8)
    high = _CODERS[coder].decode(coded, high_bytes)
    if np.bitwise_or.reduce(high) & _bits_above(width - low, plane):
        raise PackedFileError(f"a value does not fit {width} bits")
    return DecodedStream(width, count, low, plane, high, memoryview(bytes(low_bytes)))  # a copy: the coded bytes can go


def _bits_above(used: int, plane: int) -> np.uint8:
    """The bits of a byte that no value of ``used`` bits in such a plane sets."""
    return np.uint8(sum((1 << plane) - (1 << used) << place for place in range(0, 8, plane)))


class _Reader:
    """Takes bytes from the front, and never more than there are."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        if count > len(self._data) - self._at:
            raise PackedFileError(f"a block of {len(self._data)} bytes ends early")
        self._at += count
        return self._data[self._at - count : self._at]

    def is_mostly(self, some: memoryview) -> bool:
        """Whether some of the bytes are so many that they may keep all the others in memory."""
        return len(some) * 8 > len(self._data)

    def end(self) -> None:
        """Refuse bytes that nobody took."""
        if self._at != len(self._data):
            raise PackedFileError(f"a block of {len(self._data)} bytes has {len(self._data) - self._at} too many")
