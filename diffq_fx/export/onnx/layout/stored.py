"""Writes one weight into the graph once, and gives out what its readers need: integers, scales, zero points.

Whatever is derived here from the initializers (casts, joined parts, repeated scales) hangs on constants alone: onnxruntime
computes it once, when it loads the file, and drops the nodes.

Shape legend: K inputs, N output channels, R x C the grid of scales.
"""

from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.export.onnx.layout.table import Storage, WeightTable
from diffq_fx.export.onnx.layout.tensors import integer_tensor


class StoredTable:
    """One weight in a graph. Every initializer and derived value is made when it is first asked for, and then shared."""

    def __init__(self, emitter: Emitter, table: WeightTable, storage: Storage) -> None:
        self.emit = emitter
        self.table = table
        self.storage = storage
        self.name = table.spec.name
        self.axis = table.stored_axis(storage.form)
        self._casts: dict[ir.DataType, ir.Value] = {}

    @property
    def dtype(self) -> ir.DataType:
        """The type that the model computes with."""
        return from_torch_dtype(self.table.spec.dtype)

    @cached_property
    def parts(self) -> dict[int, ir.Value]:
        """Container -> the initializer of its levels."""
        parts = {}
        for width, rows in self.storage.parts.items():
            levels = self.table.stored_levels(self.storage.form, None if self.storage.width else rows)
            suffix = "levels" if self.storage.width else f"levels.{width}bit"
            parts[width] = self.emit.initializer(f"{self.name}.{suffix}", integer_tensor(levels, width, signed=self.table.signed))
        return parts

    @cached_property
    def scale(self) -> ir.Value:
        """The scales: broadcastable to the levels where there is one per row, else a matrix with C in place of the inputs."""
        return self.emit.initializer(f"{self.name}.scale", self.table.stored_groups(self.table.scale, self.storage.form))

    @cached_property
    def zero_point(self) -> ir.Value | None:
        """The zero points, of the scales' shape, in the widest container of the weight; None on the symmetric grid."""
        if self.table.zero_point is None:
            return None
        values = self.table.stored_groups(self.table.zero_point, self.storage.form)
        return self.emit.initializer(f"{self.name}.zero_point", integer_tensor(values, self.storage.widest, signed=False))

    def levels_as(self, dtype: ir.DataType) -> ir.Value:
        """All levels in a type of 8 bits or more: each part cast, and the parts joined in the order of the rows."""
        if dtype not in self._casts:
            name = f"{self.name}.{dtype.name.lower()}"
            cast = [self.cast(part, dtype, f"{name}.{width}bit") for width, part in self.parts.items()]
            if len(cast) > 1:
                joined = self.emit.op("Concat", cast, f"{name}.joined", axis=self.axis)
                cast = [self.emit.op("Gather", [joined, self._place_of_row], name, axis=self.axis)]
            self._casts[dtype] = cast[0]
        return self._casts[dtype]

    @cached_property
    def _place_of_row(self) -> ir.Value:
        """For each row its place among the joined parts: the file holds the part alone, in 2 to 8 bits a row."""
        parts = integer_tensor(self.storage.part_of_row, self.storage.part_bits, signed=False)
        part = self.cast(self.emit.initializer(f"{self.name}.part", parts), ir.DataType.INT32, f"{self.name}.part.int32")
        rows = self.sizes("rows", [self.table.spec.rows])
        rows_by_part = self.emit.argsort(part, rows, f"{self.name}.by_part")
        return self.emit.argsort(rows_by_part, rows, f"{self.name}.place")

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """``value`` in another type, itself if it has that type."""
        return value if value.dtype == dtype else self.emit.op("Cast", [value], name, dtype=dtype, to=int(dtype))

    def restore(self, value: ir.Value) -> ir.Value:
        """Make a float weight in the form of the storage the weight that PyTorch has: its shape and its type."""
        shape, axis = self.table.spec.shape, self.table.spec.axis
        if self.storage.form == "transposed":
            value = self.emit.op("Transpose", [value], f"{self.name}.restored", perm=[1, 0])
        if self.storage.form == "rows":
            moved = [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]
            value = self.emit.op("Reshape", [value, self.sizes("moved_shape", moved)], f"{self.name}.moved")
            if axis:
                back = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
                value = self.emit.op("Transpose", [value], f"{self.name}.restored", perm=back)
        return self.cast(value, self.dtype, f"{self.name}.{self.dtype.name.lower()}")

    def along_inputs(self, values: ir.Value, label: str, *, block: int, length: int) -> ir.Value:
        """Repeat scales or zero points of a matrix along its inputs: a finer grid of the same values.

        Args:
            values: as stored, a matrix.
            label: what to call the result.
            block: inputs that share a value in the result; where C > 1 a divisor of the weight's own block.
            length: number of values along the inputs in the result; what is beyond the inputs is cut off.
        """
        if self.table.blocks == 1:
            rows = self.table.spec.rows
            if length == 1 and not self.table.is_per_tensor:
                return values
            return self._expand(values, [rows, length] if self.axis == 0 else [length, rows], label)
        times = self.table.block // block
        if times > 1:
            values = self._repeat(values, label, times)
        if self.table.blocks * times > length:
            bounds = [self.sizes(f"{label}.{name}", [n]) for name, n in (("start", 0), ("stop", length), ("axis", 1 - self.axis))]
            values = self.emit.op("Slice", [values, *bounds], f"{self.name}.{label}")
        return values

    def _repeat(self, values: ir.Value, label: str, times: int) -> ir.Value:
        """Each column (row) of a matrix ``times`` times: [R, C] -> [R, C, 1] -> [R, C, times] -> [R, C * times]."""
        rows, blocks = self.table.scale.shape
        apart = [rows, blocks, 1] if self.axis == 0 else [blocks, 1, rows]
        spread = [times if i == 2 - self.axis else n for i, n in enumerate(apart)]
        flat = [rows, blocks * times] if self.axis == 0 else [blocks * times, rows]
        values = self.emit.op("Reshape", [values, self.sizes(f"{label}.apart_shape", apart)], f"{self.name}.{label}.apart")
        values = self._expand(values, spread, f"{label}.repeated")
        return self.emit.op("Reshape", [values, self.sizes(f"{label}.flat_shape", flat)], f"{self.name}.{label}.flat")

    def _expand(self, values: ir.Value, shape: list[int], label: str) -> ir.Value:
        return self.emit.op("Expand", [values, self.sizes(f"{label}.shape", shape)], f"{self.name}.{label}")

    def sizes(self, label: str, sizes: list[int]) -> ir.Value:
        """A shape or a position, as an initializer."""
        return self.emit.initializer(f"{self.name}.{label}", np.array(sizes, dtype=np.int64))
