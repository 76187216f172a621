"""Unsigned values of any width from 1 to 16 bits in exactly that many bits, in few vector operations.

A width is a sum of planes of 8, 4, 2 and 1 bits (5 = 4 + 1), from the low bits up. In a plane of p bits a byte holds 8 / p values that lie
``ceil(n / (8 / p))`` apart, not side by side, so that unpacking is one shift over consecutive bytes for each of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]  # unsigned values: uint8 up to 8 bits, else uint16


class Plane(NamedTuple):
    """``bits`` of each value, from its bit ``shift`` up: byte k of n holds those of the values k, k + n, k + 2n, ..."""

    data: NDArray[np.uint8]
    bits: int
    shift: int


def narrow(values: Values, width: int) -> Values:
    """Values of so many bits in their type."""
    return values.astype(np.uint8 if width <= 8 else np.uint16, copy=False)


def _planes_of(width: int) -> Iterator[tuple[int, int]]:
    """First bit and bits of each plane of a width."""
    first = 0
    for bits in (8, 8, 4, 2, 1):
        if width - first >= bits:
            yield first, bits
            first += bits


def packed_size(count: int, width: int) -> int:
    """Bytes that ``count`` values of ``width`` bits take."""
    return sum(-(-count * bits // 8) for _, bits in _planes_of(width))


def pack(values: Values, width: int) -> bytes:
    """Pack the low ``width`` bits of values, 0 to 16, into ``packed_size(n, width)`` bytes."""
    return b"".join(pack_plane((values >> first).astype(np.uint8), bits) for first, bits in _planes_of(width))


def pack_plane(values: NDArray[np.uint8], bits: int) -> bytes:
    """Pack the low ``bits`` of values, 1, 2, 4 or 8 of them, into one plane."""
    if bits == 8:
        return values.tobytes()
    per_byte = 8 // bits
    values = np.pad(values & np.uint8((1 << bits) - 1), (0, -len(values) % per_byte))
    places = np.arange(per_byte, dtype=np.uint8)[:, None] * np.uint8(bits)
    return np.bitwise_or.reduce(values.reshape(per_byte, -1) << places, 0).tobytes()


def planes(data: bytes | memoryview, width: int, count: int) -> list[Plane]:
    """The planes of ``count`` packed values of ``width`` bits."""
    raw, at, found = np.frombuffer(data, np.uint8), 0, []
    for first, bits in _planes_of(width):
        size = -(-count * bits // 8)
        found.append(Plane(raw[at : at + size], bits, first))
        at += size
    return found


def unpack(planes: Sequence[Plane], width: int, count: int, some: slice = slice(None)) -> Values:
    """All of ``count`` values of ``width`` bits, or a few of them."""
    start, stop, _ = some.indices(count)
    values = narrow(np.zeros(0, np.uint8), width)
    for index, (data, bits, shift) in enumerate(planes):
        plane = narrow(_unpack_plane(data, bits, start, max(stop, start)), width)
        plane = plane << plane.dtype.type(shift) if shift else plane
        values = values | plane if index else plane
    return values


def _unpack_plane(packed: NDArray[np.uint8], bits: int, start: int, stop: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed[start:stop]
    values, stride, mask = np.empty(stop - start, np.uint8), len(packed), np.uint8((1 << bits) - 1)
    for place in range(8 // bits):
        first, last = max(start, place * stride), min(stop, (place + 1) * stride)
        if first < last:
            found = values[first - start : last - start]
            np.right_shift(packed[first - place * stride : last - place * stride], np.uint8(place * bits), found)
            found &= mask
    return values
