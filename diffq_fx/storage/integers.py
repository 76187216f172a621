"""Integers on a grid, and the operator that makes weights of them.

The operator ``diffq_fx::dequantize`` is one node in every graph (eager, torch.export, ONNX), so that an exporter finds the
integers, their scales and their layout in one place.
"""

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import from_rows, scale_layout_of
from diffq_fx.kernels import memory
from diffq_fx.storage.footprint import Footprint, grid_footprint
from diffq_fx.storage.packing import container_for, pack_levels, unpack_rows
from diffq_fx.storage.stored_weight import StoredWeight
from diffq_fx.weights import WeightSpec


@torch.library.custom_op(
    "diffq_fx::dequantize",
    mutates_args=(),
    schema="(Tensor levels, Tensor scale, Tensor? zero_point, Tensor? offset, SymInt container_bits, SymInt[] shape, SymInt axis, "
    "SymInt block, ScalarType dtype) -> Tensor",  # torch 2.5 cannot read list[int] of the annotations
)
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
    for part in layout.row_slices(levels.device):  # on a CPU in the cache, and without integers as large as the weight
        levels_PI = unpack_rows(levels, container_bits, columns, part)
        weight_OI[part] = functional.dequantize(levels_PI, params.of_rows(part), layout.of_rows(part))
    return from_rows(weight_OI, tuple(shape), axis).contiguous()


@dequantize_op.register_fake
def _(levels, scale, zero_point, offset, container_bits, shape, axis, block, dtype) -> Tensor:  # noqa: ANN001
    return levels.new_empty(shape, dtype=dtype)


class IntegerWeight(StoredWeight):
    """Integers on a grid, packed into the smallest container that holds the widest group.

    Buffers:
        levels: uint8, packed levels of the weight's rows, row by row.
        scale: float, of the spec's ``scale_dtype`` where that is float16, shape of the spec's ``scale_layout``.
        zero_point: int32, the shape of ``scale``; on the grid "half" float32, a multiple of 1/2; absent on the float grid.
        offset: the type and shape of ``scale``; the float grid alone.
        bits: uint8, shape of the spec's ``bits_layout``: the learned widths.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    bits: Tensor

    def __init__(self, spec: WeightSpec, levels_OI: Tensor, params: QuantParams, bits: Tensor) -> None:
        super().__init__(spec, levels_OI.device)
        self.container_bits = container_for(int(bits.max()))
        self.register_buffer("levels", pack_levels(levels_OI, self.container_bits))
        if spec.scale_dtype == torch.float16:
            params = params._replace(scale=params.scale.half(), offset=None if params.offset is None else params.offset.half())
        for name, values in params._asdict().items():
            self.register_buffer(name, values)
        self.register_buffer("bits", bits.to(torch.uint8))

    def forward(self) -> Tensor:
        """The float weight: ``(levels - zero_point) * scale``."""
        spec, where = self.spec, (list(self.spec.shape), self.spec.axis, self.spec.scale_layout.block)
        return torch.ops.diffq_fx.dequantize(self.levels, self.scale, self.zero_point, self.offset, self.container_bits, *where, spec.dtype)

    @property
    def params(self) -> QuantParams:
        """Scale, zero point and offset, to compute with."""
        return QuantParams(self.scale, self.zero_point, self.offset).widened()

    def levels_OI(self) -> Tensor:
        """The unpacked levels, int32, shape (O, I), each in ``[0, 2^b - 1]``."""
        return unpack_rows(self.levels, self.container_bits, self.spec.columns, slice(0, self.spec.rows))

    def footprint(self) -> Footprint:
        """The parts of its sizes."""
        return grid_footprint(self.spec, self.bits)

    def as_integers(self) -> "IntegerWeight":
        """Itself."""
        return self

    def extra_repr(self) -> str:
        """Name, shape and width for ``print(model)``."""
        return f"{self.spec.name!r}, shape={self.spec.shape}, container_bits={self.container_bits}"
