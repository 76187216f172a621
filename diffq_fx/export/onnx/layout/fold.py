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
    emit, levels, zero_point = stored.emit, stored.table.levels, stored.table.zero_point
    is_narrow = zero_point is not None and max(levels.max(), zero_point.max()) <= np.iinfo(np.int8).max
    dtype = ir.DataType.INT8 if is_narrow else ir.DataType.FLOAT
    weight = stored.levels_as(dtype)
    if stored.zero_point is not None:
        weight = emit.op("Sub", [weight, stored.per_input(emit.cast(stored.zero_point, dtype))])
    if is_narrow:
        weight = emit.cast(weight, ir.DataType.FLOAT)
    return stored.restore(emit.op("Mul", [weight, stored.per_input(stored.scale)]))
