"""The rule ``fold``: for readers that onnxruntime cannot fuse with integers it makes the float weight once, when it loads the file.

``Cast(levels) -> Sub(zero_point) -> Mul(scale)`` hangs on constants alone, so onnxruntime folds it: float speed at run time, while
the file stays at 2, 4, 8 or 16 bits. A DequantizeLinear would not be folded but run at every inference (5 to 90 times slower).
"""

import onnx_ir as ir

from diffq_fx.export.onnx.layout.stored import StoredTable


def emit_folded(stored: StoredTable) -> ir.Value:
    """Write the nodes that make the float weight.

    Args:
        stored: the weight, in any form and any number of containers.

    Returns:
        The weight in PyTorch's shape and type.
    """
    emit, name = stored.emit, stored.name
    weight = stored.levels_as(ir.DataType.FLOAT)
    if stored.zero_point is not None:
        zero_point = stored.cast(stored.zero_point, ir.DataType.FLOAT, f"{name}.zero_point.float")
        weight = emit.op("Sub", [weight, _per_weight(stored, zero_point, "zero_point.per_input")], f"{name}.centred")
    weight = emit.op("Mul", [weight, _per_weight(stored, stored.scale, "scale.per_input")], f"{name}.scaled")
    return stored.restore(weight)


def _per_weight(stored: StoredTable, values: ir.Value, label: str) -> ir.Value:
    """Scales or zero points in a shape that broadcasts against the levels."""
    if stored.table.blocks == 1:
        return values
    return stored.along_inputs(values, label, block=1, length=stored.table.spec.columns)
