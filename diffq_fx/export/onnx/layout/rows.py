"""The rule ``rows``: an embedding picks integer rows and their scales, and only those rows become float.

``Gather(levels) -> Cast -> Sub(Gather(zero_point)) -> Mul(Gather(scale))``. The levels are cast to 8 bits when onnxruntime loads the file
(it has no Gather of 2 or 4 bits), so the table takes a quarter of the float memory whatever the containers of its rows are.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from diffq_fx.export.onnx.layout.emitter import Attribute, integer_type, make_node, replace_node
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable

_MIN_WEIGHTS = 2**18
"""A smaller table is folded: a float Gather is two to eight microseconds faster than the nodes of this rule."""


def picks_rows(table: WeightTable) -> bool:
    """Whether a table is large enough for this rule."""
    return table.spec.axis == 0 and len(table.spec.shape) == 2 and table.spec.numel >= _MIN_WEIGHTS


def emit_rows(stored: StoredTable, gather: ir.Node) -> None:
    """Replace a Gather, along axis 0, of a float table, which is a matrix in any form."""
    indices, table = gather.inputs[1], stored.table
    if indices is None:
        return
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        nodes.append(make_node(op_type, inputs, stored.emit.unique(f"{stored.name}.picked"), **attributes))
        return nodes[-1].outputs[0]

    def pick(values: ir.Value) -> ir.Value:
        upright = stored.emit.op("Transpose", [values], perm=[1, 0]) if stored.storage.form == "transposed" else values
        rows = add("Gather", upright, indices, axis=0)
        return rows if values.dtype == ir.DataType.FLOAT else add("Cast", rows, to=int(ir.DataType.FLOAT))

    def per_input(values: ir.Value) -> ir.Value:
        """Scales or zero points that broadcast against the picked rows."""
        picked = values if table.is_per_tensor else pick(values)
        if table.blocks == 1:
            return picked
        block_of_column = stored.emit.initializer(f"{stored.name}.block_of_column", np.arange(table.spec.columns) // table.block)
        return add("Gather", picked, block_of_column, axis=-1)

    value = pick(stored.levels_as(integer_type(max(8, table.kernel_bits), signed=table.signed)))
    if stored.zero_point is not None:
        value = add("Sub", value, per_input(stored.emit.cast(stored.zero_point, ir.DataType.FLOAT)))
    value = add("Mul", value, per_input(stored.scale))
    dtype = from_torch_dtype(table.spec.dtype)
    if dtype != ir.DataType.FLOAT:
        value = add("Cast", value, to=int(dtype))
    mark_weight(value, stored.name, "DequantizeRows", indices=(nodes[0], 1))
    replace_node(gather, nodes)
