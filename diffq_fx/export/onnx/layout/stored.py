"""Writes one weight into the graph once, and gives out what its readers need: integers, scales, zero points, or the float weight.

Whatever is derived here from the initializers (casts, joins, repeated scales, the folded float weight) hangs on constants
alone: onnxruntime computes it once, when it loads the file, and drops the nodes.

Shape legend: K inputs, N output channels, C scales along the inputs, B the block that a kernel is given.
"""

from functools import cache, cached_property
from math import prod

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.export.onnx.layout.table import Storage, WeightTable
from diffq_fx.export.onnx.layout.tensors import integer_tensor, integer_type

_INDEX_AXIS = {"transposed": 1, "rows": 0}


class StoredTable:
    """One weight in a graph: each initializer and each derived value is made when it is first asked for, and then shared."""

    def __init__(self, emitter: Emitter, table: WeightTable, storage: Storage, float_type: ir.DataType) -> None:
        self.table = table
        self.storage = storage
        self.level_names: list[str] = []
        self._emit = emitter
        self._name = table.spec.name
        self._float_type = float_type
        self._axis = table.stored_axis(storage.form)
        self._shared: dict[tuple[object, ...], ir.Value] = {}
        self.get = cache(self._get)
'''[:0]+'''"""Writes one weight into the graph once, and gives out what its readers need: integers, scales, zero points, or the float weight.

Whatever is derived here from the initializers (casts, joins, repeated scales, the folded float weight) hangs on constants
alone: onnxruntime computes it once, when it loads the file, and drops the nodes.

Shape legend: K inputs, N output channels, C scales along the inputs, B the block that a kernel is given.
"""

from functools import cached_property
from math import prod

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.export.onnx.layout.table import Storage, WeightTable
from diffq_fx.export.onnx.layout.tensors import integer_tensor, integer_type


class StoredTable:
    """One weight in a graph. Every initializer and derived value is made when it is first asked for, and then shared."""

    def __init__(self, emitter: Emitter, table: WeightTable, storage: Storage) -> None:
        self.table = table
        self.storage = storage
        self.emit = emitter
        self.name = table.spec.name
        self.axis = table.stored_axis(storage.form)
        self._casts: dict[ir.DataType, ir.Value] = {}

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
        return self.emit.initializer(f"{self.name}.scale", self.table.stored_groups(self.table.scale_RC, self.storage.form))

    @cached_property
    def zero_point(self) -> ir.Value | None:
        """The zero points, of the scales' shape, in the widest container of the weight; None on the symmetric grid."""
        if self.table.zero_point_RC is None:
            return None
        values = self.table.stored_groups(self.table.zero_point_RC, self.storage.form)
        return self.emit.initializer(f"{self.name}.zero_point", integer_tensor(values, self.storage.widest, signed=False))

    def levels_as(self, dtype: ir.DataType) -> ir.Value:
        """All levels in one type that onnxruntime can fold (8 bits or more, or float), the parts cast and joined."""
        if dtype not in self._casts:
            cast = [self.cast(part, dtype, f"{self.name}.{dtype.name.lower()}") for part in self.parts.values()]
            self._casts[dtype] = cast[0] if len(cast) == 1 else self._join(cast, dtype)
        return self._casts[dtype]

    def _join(self, parts: list[ir.Value], dtype: ir.DataType) -> ir.Value:
        name = f"{self.name}.{dtype.name.lower()}"
        joined = self.emit.op("Concat", parts, f"{name}.joined", axis=self.axis)
        order = self.cast(self._order, ir.DataType.INT32, f"{self.name}.order.int32")
        return self.emit.op("Gather", [joined, order], f"{name}.ordered", axis=self.axis)

    @cached_property
    def _order(self) -> ir.Value:
        return self.emit.initializer(f"{self.name}.order", self.storage.order_O)

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """``value`` in another type, itself if it has that type."""
        return value if value.dtype == dtype else self.emit.op("Cast", [value], name, dtype=dtype, to=int(dtype))

    def restore(self, value: ir.Value) -> ir.Value:
        """A float weight in the form of the storage, made the weight that PyTorch has: its shape and its type."""
        shape, axis = self.table.spec.shape, self.table.spec.axis
        if self.storage.form == "transposed":
            value = self.emit.op("Transpose", [value], f"{self.name}.transposed", perm=[1, 0])
        if self.storage.form == "rows":
            moved = [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]
            value = self.emit.op("Reshape", [value, self._sizes("moved_shape", moved)], f"{self.name}.moved")
            if axis:
                back = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
                value = self.emit.op("Transpose", [value], f"{self.name}.restored", perm=back)
        dtype = ir.tensor_adapters.from_torch_dtype(self.table.spec.dtype)
        return self.cast(value, dtype, f"{self.name}.{dtype.name.lower()}")

    def per_input(self, values: ir.Value, label: str, *, block: int, length: int) -> ir.Value:
        """Scales or zero points repeated along the inputs: ``length`` of them, each for ``block`` of the weight's inputs.

        Args:
            values: the scales or zero points as stored.
            label: what to call the result.
            block: inputs that the result has one value for, a divisor of the weight's own block.
            length: C of the result.

        Returns:
            The values in the form of the storage, C of them along the inputs.
        """
        along = 1 - self.axis
        rows = self.table.scale_RC.shape[0]
        if self.table.blocks == 1:
            target = [self.table.spec.rows, length] if self.axis == 0 else [length, self.table.spec.rows]
            return values if length == 1 and rows == self.table.spec.rows else self._expand(values, target, label)
        times = self.table.block // block
        if times > 1:
            spread, flat = list(self._matrix(self.table.blocks)), list(self._matrix(self.table.blocks * times))
            spread.insert(along + 1, 1)
            apart = self.emit.op("Reshape", [values, self._sizes(f"{label}.apart_shape", spread)], f"{label}.apart")
            spread[along + 1] = times
            values = self._expand(apart, spread, f"{label}.repeated")
            values = self.emit.op("Reshape", [values, self._sizes(f"{label}.flat_shape", flat)], f"{label}.flat")
        if self.table.blocks * times > length:
            bounds = [self._sizes(f"{label}.{name}", [n]) for name, n in (("start", 0), ("stop", length), ("axis", along))]
            values = self.emit.op("Slice", [values, *bounds], label)
        return values

    def _matrix(self, along: int) -> tuple[int, int]:
        rows = self.table.scale_RC.shape[0]
        return (rows, along) if self.axis == 0 else (along, rows)

    def _expand(self, values: ir.Value, shape: list[int], label: str) -> ir.Value:
        return self.emit.op("Expand", [values, self._sizes(f"{label}.shape", shape)], label)

    def _sizes(self, label: str, sizes: list[int]) -> ir.Value:
        name = label if label.startswith(self.name) else f"{self.name}.{label}"
        return self.emit.initializer(name, np.array(sizes, dtype=np.int64))
''')
