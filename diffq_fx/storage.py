"""What a converted model holds in place of a float weight: integers, and the operator that makes weights of them.

The operator ``diffq_fx::dequantize`` is one node in every graph (eager, torch.export, ONNX), so that an exporter finds the
integers, their scales and their layout in one place. Levels are packed least significant bits first, as ONNX packs them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffq_fx import functional
from diffq_fx.footprint import CONTAINER_BITS as CONTAINER_BITS
from diffq_fx.footprint import Footprint, grid_footprint
from diffq_fx.footprint import container_for as container_for
from diffq_fx.functional import QuantParams
from diffq_fx.groups import from_rows, scale_layout_of
from diffq_fx.noise import memory
from diffq_fx.weights import WeightSpec


def pack_levels(levels: Tensor, container_bits: int) -> Tensor:
    """Pack unsigned levels into bytes, least significant bits first.

    Args:
        levels: int, any shape, values in ``[0, 2^container_bits - 1]``.
        container_bits: 2, 4, 8 or 16.

    Returns:
        uint8, shape (ceil(numel * container_bits / 8),).

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


@torch.library.custom_op("diffq_fx::dequantize", mutates_args=())
def dequantize_op(
    levels: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    container_bits: int,
    shape: list[int],
    axis: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """Make the float weight of packed levels (see :func:`diffq_fx.functional.dequantize`)."""
    rows = shape[axis]
    columns = torch.Size(shape).numel() // rows
    layout, params = scale_layout_of(scale, rows, columns, block), QuantParams(scale, zero_point, offset)
    weight_OI = memory.empty((rows, columns), dtype, levels.device)
    for part in layout.row_slices():  # in the cache, and without integers as large as the weight
        numel, first = (part.stop - part.start) * columns, part.start * columns * container_bits // 8
        packed = levels[first : first + -(-numel * container_bits // 8)]
        levels_PI = unpack_levels(packed, container_bits, numel).reshape(-1, columns)
        weight_OI[part] = functional.dequantize(levels_PI, params.of_rows(part), layout.of_rows(part))
    return from_rows(weight_OI, tuple(shape), axis).contiguous()


@dequantize_op.register_fake
def _(levels, scale, zero_point, offset, container_bits, shape, axis, block, dtype) -> Tensor:  # noqa: ANN001
    return levels.new_empty(shape, dtype=dtype)


class StoredWeight(nn.Module, ABC):
    """The storage of one quantized weight; calling it gives the float weight. One subclass per kind of storage."""

    spec: WeightSpec
    packed_buffer: ClassVar[str] = "levels"
    """The buffer that the storage's operator reads first; exporters find the weight by its name."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The float weight, of the spec's shape and dtype."""

    @abstractmethod
    def payload_bits(self) -> int:
        """Bits of the levels alone, each at the width it has learned."""

    @abstractmethod
    def container_payload_bits(self) -> int:
        """Bits of the levels alone in the container that holds them."""

    @abstractmethod
    def footprint(self) -> Footprint:
        """The parts of its sizes."""


class IntegerWeight(StoredWeight):
    """Integers on an affine, symmetric or float grid, packed into the smallest container that holds the widest group.

    Buffers:
        levels: uint8, packed levels of the weight's rows, row by row.
        scale: float, shape of the spec's ``scale_layout``.
        zero_point: int32, the shape of ``scale``; absent on the float grid.
        offset: float, the shape of ``scale``; the float grid alone.
        bits: uint8, shape of the spec's ``bits_layout``: the learned widths.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    bits: Tensor

    def __init__(self, spec: WeightSpec, levels_OI: Tensor, params: QuantParams, bits: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.container_bits = container_for(int(bits.max()))
        self.register_buffer("levels", pack_levels(levels_OI, self.container_bits))
        self.register_buffer("scale", params.scale)
        self.register_buffer("zero_point", params.zero_point)
        self.register_buffer("offset", params.offset)
        self.register_buffer("bits", bits.to(torch.uint8))

    def forward(self) -> Tensor:
        """The float weight: ``(levels - zero_point) * scale``."""
        return torch.ops.diffq_fx.dequantize(
            self.levels,
            self.scale,
            self.zero_point,
            self.offset,
            self.container_bits,
            list(self.spec.shape),
            self.spec.axis,
            self.spec.scale_layout.block,
            self.spec.dtype,
        )

    def levels_OI(self) -> Tensor:
        """The unpacked levels, int32, shape (O, I), each in ``[0, 2^b - 1]``."""
        flat = unpack_levels(self.levels, self.container_bits, self.spec.numel)
        return flat.reshape(self.spec.rows, self.spec.columns)

    def payload_bits(self) -> int:
        """Sum over the groups of their learned width times their number of weights."""
        return int((self.bits.cpu().long() * self.spec.bits_layout.counts()).sum())

    def container_payload_bits(self) -> int:
        """Number of weights times the container's width."""
        return self.spec.numel * self.container_bits

    def footprint(self) -> Footprint:
        """The parts of its sizes."""
        return grid_footprint(self.spec, self.bits)

    def extra_repr(self) -> str:
        """Name, shape and width for ``print(model)``."""
        return f"{self.spec.name!r}, shape={self.spec.shape}, container_bits={self.container_bits}"
