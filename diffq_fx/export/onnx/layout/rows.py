"""The rule ``rows``: an embedding picks integer rows and their scales, and only those rows become float.

``Gather(levels) -> Cast -> Sub(Gather(zero_point)) -> Mul(Gather(scale))``. The levels are cast to 8 bits when onnxruntime loads the file
(it has no Gather of 2 or 4 bits), so the table takes a quarter of the float memory whatever the containers of its rows are.
"""

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Attribute, describe_like, make_node
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable
from diffq_fx.export.onnx.layout.tensors import integer_type

_MIN_WEIGHTS = 2**18
"""A smaller table is folded: a float Gather is two to eight microseconds faster than the nodes of this rule."""


def picks_rows(table: WeightTable) -> bool:
    """Whether a table is large enough for this rule."""
    return table.spec.axis == 0 and len(table.spec.shape) == 2 and table.spec.numel >= _MIN_WEIGHTS


def emit_rows(stored: StoredTable, gather: ir.Node) -> None:
    """Replace a Gather of a float table.

    Args:
        stored: the table, a matrix in any form.
        gather: along axis 0.
    """
    indices, graph = gather.inputs[1], gather.graph
    if indices is None or graph is None:
        return
    width = max(8, stored.storage.widest)
    picker = _Picker(stored, indices)
    value = picker.pick(_upright(stored, stored.levels_as(integer_type(width, signed=stored.table.signed)), "levels"), "levels")
    if stored.zero_point is not None:
        zero_point = stored.cast(stored.zero_point, ir.DataType.FLOAT, f"{stored.name}.zero_point.float")
        value = picker.add("Sub", [value, picker.per_row(zero_point, "zero_point")], "centred")
    value = picker.add("Mul", [value, picker.per_row(stored.scale, "scale")], "scaled")
    if stored.dtype != ir.DataType.FLOAT:
        value = picker.add("Cast", [value], "cast", to=int(stored.dtype))
    mark_weight(value, stored.name, "DequantizeRows", indices=indices)
    old = gather.outputs[0]
    describe_like(value, old)
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], picker.nodes, [old], [value])


def _upright(stored: StoredTable, values: ir.Value, label: str) -> ir.Value:
    """A matrix that is stored [K, N] as [N, K] again: a constant, so it is turned when the file is loaded."""
    if stored.storage.form != "transposed":
        return values
    return stored.emit.op("Transpose", [values], f"{stored.name}.{label}.rows", perm=[1, 0])


class _Picker:
    """The nodes that take the place of one Gather."""

    def __init__(self, stored: StoredTable, indices: ir.Value) -> None:
        self._stored = stored
        self._indices = indices
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, inputs: list[ir.Value], label: str, **attributes: Attribute) -> ir.Value:
        node = make_node(op_type, inputs, self._stored.emit.unique(f"{self._stored.name}.picked.{label}"), **attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def pick(self, table: ir.Value, label: str) -> ir.Value:
        """Some rows of a table, in float."""
        rows = self.add("Gather", [table, self._indices], label, axis=0)
        return rows if table.dtype == ir.DataType.FLOAT else self.add("Cast", [rows], f"{label}.float", to=int(ir.DataType.FLOAT))

    def per_row(self, values: ir.Value, label: str) -> ir.Value:
        """Scales or zero points that broadcast against the picked rows."""
        stored = self._stored
        if stored.table.is_per_tensor:
            return values
        picked = self.pick(_upright(stored, values, label), label)
        if stored.table.blocks == 1:
            return picked
        block_of_column = np.arange(stored.table.spec.columns) // stored.table.block
        index = stored.emit.initializer(f"{stored.name}.block_of_column", block_of_column)
        return self.add("Gather", [picked, index], f"{label}.per_input", axis=-1)
