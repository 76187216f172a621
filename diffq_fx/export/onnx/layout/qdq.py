"""The rule ``qdq``: DequantizeLinear wherever a weight is read, in the plainest form, for runtimes other than onnxruntime.

Levels that are doubled for half-integer zero points and do not fit their container get a Cast and a Mul in front of it.
"""

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import integer_tensor, integer_type
from diffq_fx.export.onnx.layout.stored import StoredTable


def emit_dequantized(stored: StoredTable) -> ir.Value:
    """Write one DequantizeLinear of a weight in one container (a matrix if it has blocks); gives the float weight in the storage's form."""
    table, axis = stored.table, stored.axis
    attributes: dict[str, int] = {}
    if table.blocks > 1:
        attributes = {"axis": 1 - axis, "block_size": table.block}
    elif not table.is_per_tensor:
        attributes = {"axis": axis}
    if stored.storage.factor is None:
        (levels,) = stored.parts.values()
    else:
        levels = stored.levels_as(integer_type(max(8, table.kernel_bits), signed=False))
    inputs = [levels, stored.scales_as(_groups(stored, table.scale))]
    if table.zero_point is not None and levels.dtype is not None:
        values = integer_tensor(_groups(stored, table.zero_point), stored.storage.zero_point_bits, signed=False)
        inputs.append(stored.emit.cast(stored.emit.initializer(f"{stored.name}.zero_point", values), levels.dtype))
    return stored.emit.op("DequantizeLinear", inputs, f"{stored.name}.dequantized", dtype=ir.DataType.FLOAT, **attributes)


def _groups(stored: StoredTable, values_RC: np.ndarray) -> np.ndarray:
    """Scales or zero points in the shape that DequantizeLinear wants: scalar, one per channel, or a matrix of blocks."""
    if stored.table.blocks > 1:
        return stored.storage.groups(values_RC)
    return values_RC.reshape(()) if stored.table.is_per_tensor else values_RC[:, 0]
