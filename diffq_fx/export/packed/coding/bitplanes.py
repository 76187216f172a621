"""Unsigned values of any width from 1 to 16 bits in exactly that many bits, in few vector operations.

A width is a sum of planes of 8, 4, 2 and 1 bits (5 = 4 + 1), from the low bits up. In a plane of p bits a byte holds 8 / p values that lie
``ceil(n / (8 / p))`` apart, not side by side, so that unpacking is one shift over consecutive bytes for each of them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
"""Unsigned values: uint8 up to 8 bits, else uint16."""


def planes_of(width: int) -> Iterator[tuple[int, int]]:
    """``(first bit, bits)`` of each plane of a width.

    Example:
        >>> list(planes_of(7))
        [(0, 4), (4, 2), (6, 1)]
    """
    first = 0
    for bits in (8, 8, 4, 2, 1):
        if width - first >= bits:
            yield first, bits
            first += bits


def packed_size(count: int, width: int) -> int:
    """Bytes that ``count`` values of ``width`` bits take.

    Example:
        >>> packed_size(8, 3), packed_size(9, 3)
        (3, 5)
    """
    return sum(-(-count * bits // 8) for _, bits in planes_of(width))


def pack(values: Values, width: int) -> bytes:
    """Pack values of ``width`` bits.

    Args:
        values: shape (n,), each below ``2^width``.
        width: 0 to 16; no bits give no bytes.

    Returns:
        ``packed_size(n, width)`` bytes.

    Example:
        >>> pack(np.array([1, 2, 3, 0, 1, 2, 3, 0], np.uint8), 2).hex()
        'dd22'
    """
    return b"".join(pack_plane((values >> first).astype(np.uint8), bits) for first, bits in planes_of(width))


def pack_plane(values: NDArray[np.uint8], bits: int) -> bytes:
    """Pack the low ``bits`` of values, 1, 2, 4 or 8 of them, into one plane."""
    if bits == 8:
        return values.tobytes()
    per_byte = 8 // bits
    values = values & np.uint8((1 << bits) - 1)
    if missing := -len(values) % per_byte:
        values = np.concatenate([values, np.zeros(missing, np.uint8)])
    columns = values.reshape(per_byte, -1)
    packed = columns[0].copy()
    for place in range(1, per_byte):
        packed |= columns[place] << np.uint8(place * bits)
    return packed.tobytes()


def unpack(data: bytes | memoryview, width: int, count: int) -> Values:
    """Undo :func:`pack`.

    Args:
        data: exactly ``packed_size(count, width)`` bytes.
        width: 1 to 16.
        count: number of values.

    Returns:
        Shape (n,), uint8 up to 8 bits, else uint16.

    Example:
        >>> unpack(bytes.fromhex("dd22"), 2, 8)
        array([1, 2, 3, 0, 1, 2, 3, 0], dtype=uint8)
    """
    raw, kind = np.frombuffer(data, np.uint8), np.uint8 if width <= 8 else np.uint16
    values: Values | None = None
    start = 0
    for first, bits in planes_of(width):
        stop = start + -(-count * bits // 8)
        plane = unpack_plane(raw[start:stop], bits, count).astype(kind, copy=False)
        values = plane if values is None else values | (plane << kind(first))
        start = stop
    return np.zeros(0, kind) if values is None else values


def unpack_plane(packed: NDArray[np.uint8], bits: int, count: int, some: slice = slice(None)) -> NDArray[np.uint8]:
    """Undo :func:`pack_plane`, for all of ``count`` values or a few of them."""
    if bits == 8:
        return packed[some]
    start, stop, _ = some.indices(count)
    values, stride, mask = np.empty(max(stop - start, 0), np.uint8), len(packed), np.uint8((1 << bits) - 1)
    for place in range(8 // bits):
        first, last = max(start, place * stride), min(stop, (place + 1) * stride)
        if first < last:
            found = values[first - start : last - start]
            np.right_shift(packed[first - place * stride : last - place * stride], np.uint8(place * bits), found)
            found &= mask
    return values
