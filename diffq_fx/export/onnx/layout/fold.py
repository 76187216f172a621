"""The rule ``fold``: for readers that onnxruntime cannot fuse with integers it makes the float weight once, when it loads the file.

``Cast(levels) -> Sub(zero_point) -> Mul(scale)`` hangs on constants alone, so onnxruntime folds it: float speed at run time, while
the file stays at 2, 4, 8 or 16 bits. A DequantizeLinear would not be folded but run at every inference (5 to 90 times slower).
"""

import onnx_ir as ir

from diffq_fx.export.onnx.layout.stored import StoredTable


def emit_folded(stored: StoredTable) -> ir.Value:
    """Write the nodes that make the float weight of one in any form and any number of containers; gives PyTorch's shape and type."""
    weight = stored.levels_as(ir.DataType.FLOAT)
    if stored.zero_point is not None:
        weight = stored.emit.op("Sub", [weight, stored.per_input(stored.emit.cast(stored.zero_point, ir.DataType.FLOAT))])
    return stored.restore(stored.emit.op("Mul", [weight, stored.per_input(stored.scale)]))
