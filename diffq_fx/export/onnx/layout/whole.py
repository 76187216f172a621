"""The rules that give a whole weight in float: ``fold``, ``codebook`` and, for runtimes other than onnxruntime, ``qdq``.

``fold``: readers that onnxruntime cannot fuse with integers get ``Cast(levels) -> Sub(zero_point) -> Mul(scale)``. It hangs on constants
alone, so onnxruntime folds it when it loads the file: float speed at run time, while the file stays at 2, 4, 8 or 16 bits. A
DequantizeLinear would not be folded but run at every inference (5 to 90 times slower).

``codebook``: ``Gather(codebook, Cast(codes))``, folded alike; codes are uint2, uint4, uint8 or uint16.
"""

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter, integer_tensor, integer_type
from diffq_fx.export.onnx.layout.stored import StoredTable, restore_rows
from diffq_fx.storage.codebook import CodebookWeight


def emit_folded(stored: StoredTable) -> ir.Value:
    """Write the nodes that make the float weight of one in any form and any number of containers; gives PyTorch's shape and type.

    onnxruntime (1.31) keeps what each of them gives until all weights are folded, so the difference is taken in bytes where it fits.
    """
    emit, levels, zero_point = stored.emit, stored.table.levels, stored.table.zero_point
    is_narrow = zero_point is not None and max(levels.max(), zero_point.max()) <= np.iinfo(np.int8).max
    dtype = ir.DataType.INT8 if is_narrow else ir.DataType.FLOAT
    weight = stored.levels_as(dtype)
    if stored.zero_point is not None:
        weight = emit.op("Sub", [weight, stored.per_input(emit.cast(stored.zero_point, dtype))])
    if is_narrow:
        weight = emit.cast(weight, ir.DataType.FLOAT)
    return stored.restore(emit.op("Mul", [weight, stored.per_input(stored.scale)]))


def emit_looked_up(emit: Emitter, weight: CodebookWeight, container: int) -> tuple[ir.Value, ir.Value]:
    """Write the codes, the codebook and what makes the float weight of them; gives that, as PyTorch has it, and the codes."""
    spec, codes_OC = weight.spec, weight.codes_OC().cpu().numpy()
    codes = emit.initializer(f"{spec.name}.codes", integer_tensor(codes_OC, container, signed=False))
    index = emit.cast(codes, ir.DataType.INT32)
    entries = emit.cast(emit.initializer(f"{spec.name}.codebook", weight.codebook.cpu().numpy()), ir.DataType.FLOAT)  # (K, D)
    if weight.scale is not None:
        entries = emit.op("Mul", [entries, emit.initializer(f"{spec.name}.codebook.scale", weight.scale.cpu().numpy())])
    value = emit.op("Gather", [entries, index])  # (O, C, D)
    filled = codes_OC.shape[1] * weight.block_size
    if filled > spec.columns:
        value = emit.op("Reshape", [value, emit.sizes(spec.rows, filled)])
        value = emit.op("Slice", [value, *(emit.sizes(bound) for bound in (0, spec.columns, 1))])
    return restore_rows(emit, value, spec), codes


def emit_dequantized(stored: StoredTable) -> ir.Value:
    """Write one DequantizeLinear of a weight in one container (a matrix if it has blocks); gives the float weight in the storage's form.

    Levels that are doubled for half-integer zero points and do not fit their container get a Cast and a Mul in front of it.
    """
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
