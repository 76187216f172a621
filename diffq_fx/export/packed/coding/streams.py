"""Streams of unsigned values as bytes: bit-packed, or with their high bits entropy coded.

The low bits of a stream, which hardly ever tell anything, stay as they are. Its high bits are packed into bytes as one bit plane (of 1,
2, 4 or 8 bits, so that a byte holds 8 to 1 values), and these bytes go through a coder. Which bits are low, how wide the plane is, and
which coder, is chosen by the length of the outcome.

=====  =======  =============================================================================================================
coder  name     what it does
=====  =======  =============================================================================================================
0      stored   nothing is coded: every bit is low
1      deflate  Huffman codes: fast, and mostly within 1 % of the entropy
2      ans      at the entropy, several times slower, one thread at a time; taken for small models, and where it saves more than 1.2 %
=====  =======  =============================================================================================================

A block of streams, whose widths and counts the reader knows, is for each stream that is not empty (little endian)::

    head   u8      coder, 2 bits; log2 of the bits that a value takes in the plane, 2 bits; low bits of a value, 4 bits; 0 if stored
    size   u32     bytes of the coded plane; not if stored
    the coded plane
    the low bits, bit-packed
"""

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding import ans, deflate
from diffq_fx.export.packed.coding.bitplanes import Values, pack, pack_plane, packed_size, planes_of, unpack, unpack_plane
from diffq_fx.export.packed.coding.source import Source
from diffq_fx.export.packed.coding.unpacking import Plane

STORED, DEFLATE, ANS = 0, 1, 2

_SIZE = struct.Struct("<I")
_WORTH_IT = 0.99
"""Coding must bring a long stream below this share of its size."""
_WORTH_THE_TIME = 0.988
"""The slower coder must bring a long stream below this share of its Huffman codes."""
_NEARLY_AS_SHORT = 1.007
"""The coded bytes of a long stream may be fewer at the cost of such a share of its size."""
_LEAST = 14
"""Bytes that a coded stream has at least."""
_SHORT = 1 << 9
"""Values of a stream that the slower coder does not take long for."""
_ITEM = 4
"""Bytes of the numbers that :func:`encode_bytes` expects: each place in them is a stream, since the highest bytes are much alike."""
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


def encode_block(streams: Sequence[Stream], *, entropy: bool, is_patient: bool = False) -> bytes:
    """Encode streams.

    Args:
        streams: any number of them, the empty ones too.
        entropy: False packs every stream at its width.
        is_patient: take the slower coder wherever it is the shorter one.

    Example:
        >>> values = np.array([0, 1, 0, 0] * 1000, np.uint8)
        >>> len(encode_block([Stream(3, values)], entropy=False)), len(encode_block([Stream(3, values)], entropy=True))
        (1501, 331)
    """
    return b"".join(_encode(stream, entropy, is_patient) for stream in streams if stream.count)


def encode_bytes(data: bytes, *, entropy: bool, is_patient: bool = False) -> bytes:
    """Encode numbers of 4 bytes, or anything else, as :func:`encode_block` does 4 streams: byte k is in stream k mod 4.

    Example:
        >>> data = np.linspace(1, 2, 1000, dtype=np.float32).tobytes()
        >>> len(data), len(encode_bytes(data, entropy=True)), decode_bytes(Source.of(encode_bytes(data, entropy=True)), 4000) == data
        (4000, 2885, True)
    """
    raw = np.frombuffer(data, np.uint8)
    return encode_block([Stream(8, raw[place::_ITEM]) for place in range(_ITEM)], entropy=entropy, is_patient=is_patient)


def _encode(stream: Stream, entropy: bool, is_patient: bool) -> bytes:
    stored = bytes(1) + pack(stream.values, stream.width)
    cuts = _good_cuts(stream, is_patient or stream.count <= _SHORT) if entropy and len(stored) > _LEAST else ()
    return min((stored, *(_coded(stream, cut) for cut in cuts)), key=len)


def _coded(stream: Stream, cut: _Cut) -> bytes:
    plane = np.frombuffer(pack_plane((stream.values >> cut.low).astype(np.uint8), cut.plane), np.uint8)
    coded, head = _CODERS[cut.coder].encode(plane), cut.coder | (cut.plane.bit_length() - 1) << 2 | cut.low << 4
    return bytes([head]) + _SIZE.pack(len(coded)) + coded + pack(stream.values, cut.low)


def _good_cuts(stream: Stream, is_patient: bool) -> list[_Cut]:
    """The ways to code a stream that are worth a try; without patience one at most, a fast one if it is nearly as short."""
    counts, lows = np.bincount(stream.values, minlength=1 << stream.width), range(max(stream.width - 8, 0), stream.width)
    shortest = functools.partial(min, key=lambda cut: cut.bits)
    huffman, exact = [_cut(DEFLATE, counts, stream.width, low) for low in lows], _cut(ANS, counts, stream.width, lows[0])
    if is_patient:
        return [
            shortest(huffman),
            exact,
            shortest(_cut(ANS, counts, stream.width, low, plane=8) for low in lows),
        ]  # a table of single values is short
    limit, short = _WORTH_IT * stream.width * stream.count, shortest(huffman).bits
    fast = min((cut for cut in huffman if cut.bits <= _NEARLY_AS_SHORT * short), key=lambda cut: (cut.plane, cut.bits))
    best = exact if exact.bits < _WORTH_THE_TIME * min(short, limit) else fast
    return [best] if best.bits < limit else []


def _cut(coder: int, counts: NDArray[np.int64], width: int, low: int, plane: int | None = None) -> _Cut:
    number = int(counts.sum())
    plane = next(bits for bits in (1, 2, 4, 8) if bits >= width - low) if plane is None else plane
    high = counts.reshape(-1, 1 << low).sum(1) / number
    symbols = high
    for _ in range(8 // plane - 1):  # values far from each other share a byte: take them for independent
        symbols = np.multiply.outer(symbols, high).reshape(-1)
    bits = _CODERS[coder].expected_bits(symbols, -(-number * plane // 8))
    return _Cut(coder, low, plane, bits + low * number)


class DecodedStream:
    """A stream of a block that has been decoded: its values can be had piece by piece, and until then take little room."""

    def __init__(
        self, width: int, count: int, low: int, plane: int, high_bytes: NDArray[np.uint8] | None, low_bytes: bytes | memoryview
    ) -> None:
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

    def values(self) -> Values:
        """The values, made anew at each call: uint8 up to 8 bits, else uint16."""
        kind = np.uint8 if self._width <= 8 else np.uint16
        if self._high_bytes is None:
            return unpack(self._low_bytes, self._width, self.count)
        high = unpack_plane(self._high_bytes, self._plane, self.count).astype(kind, copy=False)
        if not self._low:
            return high
        values = high << kind(self._low)
        values |= unpack(self._low_bytes, self._low, self.count).astype(kind, copy=False)
        return values


def decode_block(source: Source, expected: Sequence[tuple[int, int]]) -> list[DecodedStream]:
    """Undo :func:`encode_block`.

    Args:
        source: exactly the block.
        expected: width and count of each stream.

    Returns:
        The streams.

    Raises:
        PackedFileError: the block is damaged, or not of these streams.
    """
    streams = [_decode(source, width, count) if count else DecodedStream(width, 0, width, 0, None, b"") for width, count in expected]
    source.end()
    return streams


def decode_bytes(source: Source, size: int) -> bytes:
    """Undo :func:`encode_bytes`.

    Args:
        source: exactly the block.
        size: of the outcome.

    Raises:
        PackedFileError: the block is damaged, or not of this size.
    """
    streams = decode_block(source, [(8, len(range(place, size, _ITEM))) for place in range(_ITEM)])
    raw = np.empty(size, np.uint8)
    for place, stream in enumerate(streams):
        raw[place::_ITEM] = stream.values()
    return raw.tobytes()


def _decode(source: Source, width: int, count: int) -> DecodedStream:
    head = source.take(1)[0]
    if head == STORED:
        return DecodedStream(width, count, width, 0, None, source.take(packed_size(count, width)))
    coder, plane, low = head & 3, 1 << (head >> 2 & 3), head >> 4
    if coder not in _CODERS or not 0 < width - low <= plane:
        raise PackedFileError(f"a stream of {width} bits has a damaged head: coder {coder}, {low} low bits, plane of {plane}")
    coded, high_bytes = source.take(_SIZE.unpack(source.take(_SIZE.size))[0]), -(-count * plane // 8)
    high = _CODERS[coder].decode(memoryview(coded), high_bytes)
    if np.bitwise_or.reduce(high) & _bits_above(width - low, plane):
        raise PackedFileError(f"a value does not fit {width} bits")
    return DecodedStream(width, count, low, plane, high, source.take(packed_size(count, low)))


def _bits_above(used: int, plane: int) -> np.uint8:
    """The bits of a byte that no value of ``used`` bits in such a plane sets."""
    return np.uint8(sum((1 << plane) - (1 << used) << place for place in range(0, 8, plane)))
