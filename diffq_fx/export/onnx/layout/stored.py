"""Writes one weight into the graph once, and gives out what its readers need: integers, scales, zero points.

Whatever is derived here from the initializers (casts, joined parts, repeated scales) hangs on constants alone: onnxruntime
computes it once, when it loads the file, and drops the nodes.

Shape legend: K inputs, N output channels, R x C the grid of scales.
"""

from functools import cached_property

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from diffq_fx.export.onnx.layout.emitter import Emitter, integer_tensor
from diffq_fx.export.onnx.layout.table import Storage
from diffq_fx.weights import WeightSpec


class StoredTable:
    """One weight in a graph. Every initializer and derived value is made when it is first asked for, and then shared."""

    def __init__(self, emitter: Emitter, storage: Storage) -> None:
        self.emit = emitter
        self.table = storage.table
        self.storage = storage
        self.name = storage.table.spec.name
        self.axis = storage.axis
        self._casts: dict[ir.DataType, ir.Value] = {}

    @cached_property
    def parts(self) -> dict[int, ir.Value]:
        """Container -> the initializer of its levels."""
        parts = {}
        for width, rows in self.storage.parts.items():
            levels = self.storage.levels(None if self.storage.width else rows)
            suffix = "levels" if self.storage.width else f"levels.{width}bit"
            parts[width] = self.emit.initializer(f"{self.name}.{suffix}", integer_tensor(levels, width, signed=self.table.signed))
        return parts

    @cached_property
    def scale(self) -> ir.Value:
        """The scales: broadcastable to the levels where there is one per row, else a matrix with C in place of the inputs."""
        return self.scales_as(self.storage.groups(self.table.scale))

    def scales_as(self, scales: np.ndarray) -> ir.Value:
        """Scales in some shape, in float32; the file holds those that were trained as values of float16 in that."""
        halves = scales.astype(np.float16) if self.table.spec.scale_dtype == torch.float16 else None
        if halves is None or not (halves == scales).all():
            return self.emit.initializer(f"{self.name}.scale", scales)
        return self.emit.cast(self.emit.initializer(f"{self.name}.scale", halves), ir.DataType.FLOAT)

    @cached_property
    def zero_point(self) -> ir.Value | None:
        """The zero points, of the scales' shape, in the container of the storage; None on the symmetric grid."""
        if self.table.zero_point is None:
            return None
        values = self.storage.groups(self.table.zero_point)
        return self.emit.initializer(f"{self.name}.zero_point", integer_tensor(values, self.storage.zero_point_bits, signed=False))

    def levels_as(self, dtype: ir.DataType) -> ir.Value:
        """All levels in a type of 8 bits or more: each part cast, the parts joined in the order of the rows, doubled where that is due."""
        if dtype not in self._casts:
            if self._factor is None:
                self._casts[dtype] = self._joined(dtype)
            else:
                doubled = self.emit.op("Mul", [self._joined(ir.DataType.INT32), self.per_input(self._factor)])
                self._casts[dtype] = self.emit.cast(doubled, dtype)
        return self._casts[dtype]

    def _joined(self, dtype: ir.DataType) -> ir.Value:
        cast = [self.emit.cast(part, dtype) for part in self.parts.values()]
        if len(cast) == 1:
            return cast[0]
        return self.emit.op("Gather", [self.emit.op("Concat", cast, axis=self.axis), self._place_of_row], axis=self.axis)

    @cached_property
    def _factor(self) -> ir.Value | None:
        """What the levels of the file are multiplied by, in int32."""
        factor, name = self.storage.factor, f"{self.name}.factor"
        if factor is None or factor.size == 1:
            return None if factor is None else self.emit.initializer(name, np.array(factor.item(), dtype=np.int32))
        held = self.emit.initializer(name, integer_tensor(self.storage.groups(factor), self.storage.part_bits, signed=False))
        return self.emit.cast(held, ir.DataType.INT32)

    @cached_property
    def learned_scale(self) -> ir.Value:
        """The scales of the levels in the file, which are not doubled yet."""
        return self.scale if self._factor is None else self.emit.op("Mul", [self.scale, self.emit.cast(self._factor, ir.DataType.FLOAT)])

    def per_input(self, values: ir.Value) -> ir.Value:
        """Scales, zero points or factors in a shape that broadcasts with the levels."""
        is_one = values.const_value is not None and values.const_value.size == 1
        return values if self.table.blocks == 1 or is_one else self.along_inputs(values, block=1, length=self.table.spec.columns)

    @cached_property
    def _place_of_row(self) -> ir.Value:
        """For each row its place among the joined parts: the file holds the part alone, in 2 to 8 bits a row."""
        parts = integer_tensor(self.storage.part_of_row, self.storage.part_bits, signed=False)
        part = self.emit.cast(self.emit.initializer(f"{self.name}.part", parts), ir.DataType.INT32)
        rows = self.emit.sizes(self.table.spec.rows)
        return self.emit.argsort(self.emit.argsort(part, rows), rows)

    def restore(self, value: ir.Value) -> ir.Value:
        """Make a float weight in the form of the storage the weight that PyTorch has: its shape and its type."""
        if self.storage.form == "transposed":
            value = self.emit.op("Transpose", [value], perm=[1, 0])
        return restore_rows(self.emit, value, self.table.spec, has_rows=self.storage.form == "rows")

    def along_inputs(self, values: ir.Value, *, block: int, length: int) -> ir.Value:
        """Repeat scales or zero points of a matrix along its inputs: a finer grid of the same values.

        Args:
            values: as stored, a matrix.
            block: inputs that share a value in the result; where C > 1 a divisor of the weight's own block.
            length: number of values along the inputs in the result; what is beyond the inputs is cut off.
        """
        rows, blocks = self.table.scale.shape
        if blocks == 1:
            if length == 1 and not self.table.is_per_tensor:
                return values
            return self.emit.op("Expand", [values, self._shape(self.table.spec.rows, length)])
        times = self.table.block // block
        if times > 1:  # [R, C] -> [R, C, 1] -> [R, C, times] -> [R, C * times], or turned
            apart = self.emit.op("Reshape", [values, self._shape(rows, blocks, 1)])
            repeated = self.emit.op("Expand", [apart, self._shape(rows, blocks, times)])
            values = self.emit.op("Reshape", [repeated, self._shape(rows, blocks * times)])
        if blocks * times > length:
            values = self.emit.op("Slice", [values, *(self.emit.sizes(bound) for bound in (0, length, 1 - self.axis))])
        return values

    def _shape(self, rows: int, *columns: int) -> ir.Value:
        """(rows, columns), or (columns, rows) where the channels lie along the second axis."""
        return self.emit.sizes(rows, *columns) if self.axis == 0 else self.emit.sizes(*columns, rows)


def restore_rows(emit: Emitter, value: ir.Value, spec: WeightSpec, *, has_rows: bool = True) -> ir.Value:
    """Give a float weight the shape (if it ``has_rows``: (O, I)) and the type that it has in PyTorch."""
    shape, axis = spec.shape, spec.axis
    if has_rows:
        value = emit.op("Reshape", [value, emit.sizes(shape[axis], *(n for i, n in enumerate(shape) if i != axis))])
        if axis:
            value = emit.op("Transpose", [value], perm=[*range(1, axis + 1), 0, *range(axis + 1, len(shape))])
    return emit.cast(value, from_torch_dtype(spec.dtype))
