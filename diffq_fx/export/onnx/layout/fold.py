"""The rule ``fold``: for readers that onnxruntime cannot fuse with integers it makes the float weight once, when it loads the file.

``Cast(levels) -> Sub(zero_point) -> Mul(scale)`` hangs on constants alone, so onnxruntime folds it: float speed at run time, while
the file stays at 2, 4, 8 or 16 bits. A DequantizeLinear would not be folded but run at every inference (5 to 90 times slower).
onnxruntime (1.31) keeps what each of these nodes gives until all weights are folded, so the difference is taken in bytes where it fits.
"""

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.stored import StoredTable


def emit_folded(stored: StoredTable) -> ir.Value:
    """Write the nodes that make the float weight of one in any form and any number of containers; gives PyTorch's shape and type."""
    emit, table = stored.emit, stored.table
    if stored.zero_point is None or table.zero_point is None:
        weight = stored.levels_as(ir.DataType.FLOAT)
    else:
        fits = max(table.levels.max(), table.zero_point.max()) <= np.iinfo(np.int8).max
        dtype = ir.DataType.INT8 if fits else ir.DataType.FLOAT
        middle = stored.per_input(emit.cast(stored.zero_point, dtype))
        weight = emit.cast(emit.op("Sub", [stored.levels_as(dtype), middle]), ir.DataType.FLOAT)
    return stored.restore(emit.op("Mul", [weight, stored.per_input(stored.scale)]))
