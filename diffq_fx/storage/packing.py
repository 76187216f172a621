"""Levels and codes in the fewest bytes of a container width, least significant bits first, as ONNX packs them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

CONTAINER_BITS = (2, 4, 8, 16)
"""The widths that ONNX (and a byte-addressed memory) can hold."""

SMALL_TABLE_BYTES = 512
"""Integers of fewer bytes are kept as they are: a smaller type would not pay for what says so."""

_NARROW_TYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32)


def narrowed(table: Tensor) -> Tensor:
    """The same integers in the smallest type that holds them; anything else, and what is small, as it is.

    Example:
        >>> narrowed(torch.arange(300)).dtype, narrowed(torch.arange(3)).dtype
        (torch.int16, torch.int64)
    """
    if table.dtype not in (torch.int64, torch.int32) or table.nbytes < SMALL_TABLE_BYTES:
        return table
    low, high = (int(end) for end in torch.aminmax(table))
    fitting = (dtype for dtype in _NARROW_TYPES if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)
    return table.to(next(fitting, table.dtype))


def in_smallest_type(tensor: Tensor) -> Tensor:
    """A tensor as a packed file holds it: :func:`narrowed`, and float32 as float16 where that has every value.

    Example:
        >>> in_smallest_type(torch.ones(2)).dtype, in_smallest_type(torch.full((2,), 0.1)).dtype
        (torch.float16, torch.float32)
    """
    if tensor.dtype != torch.float32:
        return narrowed(tensor)
    half = tensor.half()
    return half if torch.equal(half.float().view(torch.int32), tensor.view(torch.int32)) else tensor


def tables_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors without the large integer tables that are equal to an earlier one, such as relative positions in every layer.

    Example:
        >>> len(tables_once([torch.arange(300), torch.arange(300), torch.ones(300), torch.ones(300)]))
        3
    """
    found: dict[Any, Tensor] = {}
    for tensor in tensors:
        found.setdefault(table_key(tensor), tensor)
    return list(found.values())


def table_key(tensor: Tensor) -> Any:
    """What large integer tables that are equal have in common; any other tensor is equal to itself alone."""
    is_table = not tensor.is_floating_point() and not tensor.is_complex() and tensor.nbytes >= SMALL_TABLE_BYTES
    return (tensor.dtype, tensor.shape, tensor.detach().cpu().numpy().tobytes()) if is_table else id(tensor)


def container_for(bits: int) -> int:
    """Smallest container width that holds ``bits``.

    Example:
        >>> [container_for(b) for b in (1, 3, 5, 9)]
        [2, 4, 8, 16]
    """
    return next(width for width in CONTAINER_BITS if width >= bits)


def pack_levels(levels: Tensor, container_bits: int) -> Tensor:
    """Pack levels from 0 to ``2^container_bits - 1`` into bytes, uint8 in one row, least significant bits first.

    Example:
        >>> pack_levels(torch.tensor([1, 2, 3]), 4)
        tensor([33,  3], dtype=torch.uint8)
    """
    flat = levels.reshape(-1)
    if container_bits == 16:
        return torch.stack([flat & 0xFF, flat >> 8], 1).to(torch.uint8).reshape(-1)
    if container_bits == 8:
        return flat.to(torch.uint8)
    per_byte = 8 // container_bits
    flat = nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % per_byte)).reshape(-1, per_byte)
    packed = flat[:, 0].clone()
    for place in range(1, per_byte):
        packed |= flat[:, place] << (place * container_bits)
    return packed


def unpack_levels(packed: Tensor, container_bits: int, numel: int) -> Tensor:
    """Undo :func:`pack_levels`: int32 of shape (numel,).

    Example:
        >>> unpack_levels(torch.tensor([33, 3], dtype=torch.uint8), 4, 3)
        tensor([1, 2, 3], dtype=torch.int32)
    """
    if container_bits == 16:
        pairs = packed.to(torch.int32).reshape(-1, 2)
        return pairs[:, 0] | (pairs[:, 1] << 8)
    if container_bits == 8:
        return packed.to(torch.int32)
    mask = (1 << container_bits) - 1
    places = [(packed >> (place * container_bits)) & mask for place in range(8 // container_bits)]
    return torch.stack(places, 1).reshape(-1)[:numel].to(torch.int32)


def unpack_rows(packed: Tensor, container_bits: int, columns: int, rows: slice) -> Tensor:
    """The levels of some rows of so many columns, int32 of shape (R, columns), without unpacking the others.

    Example:
        >>> unpack_rows(torch.tensor([33, 67, 101], dtype=torch.uint8), 4, 3, slice(1, 2))
        tensor([[4, 5, 6]], dtype=torch.int32)
    """
    per_byte = max(8 // container_bits, 1)
    first, stop = rows.start * columns // per_byte * per_byte, rows.stop * columns
    flat = unpack_levels(packed[first * container_bits // 8 : -(-stop * container_bits // 8)], container_bits, stop - first)
    return flat[rows.start * columns - first :].reshape(-1, columns)
