"""Streams of unsigned values as bytes: bit-packed, or with their high bits entropy coded.

The low bits of a stream, which hardly ever tell anything, stay as they are. Its high bits are packed into bytes as one bit plane, and these
bytes go through a coder: deflate, which is fast, or ans, which is shorter but several times slower and taken for small models and where it
saves more than 1.2 %. Which bits are low, how wide the plane is, and which coder, is chosen by the length of the outcome.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed import ans, deflate
from diffq_fx.export.packed.bitplanes import Plane, Values, pack, pack_plane, packed_size, planes, unpack
from diffq_fx.export.packed.container import Source

STORED, DEFLATE, ANS = 0, 1, 2

_SIZE = struct.Struct("<I")
_WORTH_IT = 0.99  # coding must bring a long stream below this share of its size
_WORTH_THE_TIME = 0.988  # the slower coder must bring a long stream below this share of its Huffman codes
_NEARLY_AS_SHORT = 1.007  # the coded bytes of a long stream may be fewer at the cost of such a share of its size
_LEAST = 14  # bytes that a coded stream has at least
_SHORT = 1 << 9  # values of a stream that the slower coder does not take long for
_ITEM = 4  # bytes of the numbers that :func:`encode_bytes` expects: each place in them is a stream, since the highest bytes are much alike
_CODERS = {DEFLATE: deflate, ANS: ans}


class Effort(NamedTuple):
    """How hard a writer tries: without ``entropy`` it packs at the width; if patient it takes the slower coder wherever that is shorter."""

    entropy: bool
    is_patient: bool = False


class Stream(NamedTuple):
    """Values of one width."""

    width: int
    values: Values


class _Cut(NamedTuple):
    """A way to code a stream, and about how long it makes it."""

    coder: int
    low: int
    plane: int
    bits: float


def encode_block(streams: Sequence[Stream], effort: Effort) -> bytes:
    """Encode any number of streams, the empty ones too."""
    return b"".join(_encode(stream, effort) for stream in streams if len(stream.values))


def encode_bytes(data: bytes, effort: Effort) -> bytes:
    """Encode numbers of 4 bytes, or anything else, as :func:`encode_block` does 4 streams: byte k is in stream k mod 4."""
    raw = np.frombuffer(data, np.uint8)
    return encode_block([Stream(8, raw[place::_ITEM]) for place in range(_ITEM)], effort)


def _encode(stream: Stream, effort: Effort) -> bytes:
    stored = bytes(1) + pack(stream.values, stream.width)
    cuts = _good_cuts(stream, effort.is_patient or len(stream.values) <= _SHORT) if effort.entropy and len(stored) > _LEAST else ()
    return min((stored, *(_coded(stream, cut) for cut in cuts)), key=len)


def _coded(stream: Stream, cut: _Cut) -> bytes:
    plane = np.frombuffer(pack_plane((stream.values >> cut.low).astype(np.uint8), cut.plane), np.uint8)
    coded, head = _CODERS[cut.coder].encode(plane), cut.coder | (cut.plane.bit_length() - 1) << 2 | cut.low << 4
    return bytes([head]) + _SIZE.pack(len(coded)) + coded + pack(stream.values, cut.low)


def _good_cuts(stream: Stream, is_patient: bool) -> list[_Cut]:
    """The ways to code a stream that are worth a try; without patience one at most, a fast one if it is nearly as short."""
    counts, lows = np.bincount(stream.values, minlength=1 << stream.width), range(max(stream.width - 8, 0), stream.width)
    huffman, exact = [_cut(DEFLATE, counts, stream.width, low) for low in lows], _cut(ANS, counts, stream.width, lows[0])
    shortest = min(huffman, key=lambda cut: cut.bits)
    if is_patient:  # a table of single values, in a plane of 8 bits, is short
        return [shortest, exact, min((_cut(ANS, counts, stream.width, low, plane=8) for low in lows), key=lambda cut: cut.bits)]
    limit = _WORTH_IT * stream.width * len(stream.values)
    fast = min((cut for cut in huffman if cut.bits <= _NEARLY_AS_SHORT * shortest.bits), key=lambda cut: (cut.plane, cut.bits))
    best = exact if exact.bits < _WORTH_THE_TIME * min(shortest.bits, limit) else fast
    return [best] if best.bits < limit else []


def _cut(coder: int, counts: NDArray[np.int64], width: int, low: int, plane: int | None = None) -> _Cut:
    number = int(counts.sum())
    plane = next(bits for bits in (1, 2, 4, 8) if bits >= width - low) if plane is None else plane
    high = counts.reshape(-1, 1 << low).sum(1) / number
    symbols = high
    for _ in range(8 // plane - 1):  # values far from each other share a byte: take them for independent
        symbols = np.multiply.outer(symbols, high).reshape(-1)
    bits = _CODERS[coder].estimated_bits(symbols, -(-number * plane // 8))
    return _Cut(coder, low, plane, bits + low * number)


class DecodedStream(NamedTuple):
    """A stream of a block: its values take little room until somebody wants them."""

    width: int
    count: int
    planes: list[Plane]

    def values(self, some: slice = slice(None)) -> Values:
        """The values, made anew at each call."""
        return unpack(self.planes, self.width, self.count, some)


def decode_block(source: Source, size: int, expected: Sequence[tuple[int, int]]) -> list[DecodedStream]:
    """Undo :func:`encode_block`, whose ``size`` bytes come next and have streams of these widths and counts; an error if it is damaged."""
    before = source.left
    streams = [_decode(source, width, count) if count else DecodedStream(width, 0, []) for width, count in expected]
    if before - source.left != size:
        raise PackedFileError(f"the streams of a block take {before - source.left} bytes, it has {size}")
    return streams


def decode_bytes(source: Source, size: int, expected: int) -> bytes:
    """Undo :func:`encode_bytes`, whose block of ``size`` bytes comes next, and gives as many as are expected."""
    raw = np.empty(expected, np.uint8)
    for place, stream in enumerate(decode_block(source, size, [(8, len(range(place, expected, _ITEM))) for place in range(_ITEM)])):
        raw[place::_ITEM] = stream.values()
    return raw.tobytes()


def _decode(source: Source, width: int, count: int) -> DecodedStream:
    head = source.take(1)[0]
    if head == STORED:
        return DecodedStream(width, count, planes(source.take(packed_size(count, width)), width, count))
    coder, plane, low = head & 3, 1 << (head >> 2 & 3), head >> 4
    if coder not in _CODERS or not 0 < width - low <= plane:
        raise PackedFileError(f"a stream of {width} bits has a damaged head: coder {coder}, {low} low bits, plane of {plane}")
    coded, high_bytes = source.take(_SIZE.unpack(source.take(_SIZE.size))[0]), -(-count * plane // 8)
    high = _CODERS[coder].decode(memoryview(coded), high_bytes)
    if np.bitwise_or.reduce(high) & _bits_above(width - low, plane):
        raise PackedFileError(f"a value does not fit {width} bits")
    return DecodedStream(width, count, [*planes(source.take(packed_size(count, low)), low, count), Plane(high, plane, low)])


def _bits_above(used: int, plane: int) -> np.uint8:
    """The bits of a byte that no value of ``used`` bits in such a plane sets."""
    return np.uint8(sum((1 << plane) - (1 << used) << place for place in range(0, 8, plane)))
