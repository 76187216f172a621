"""The rule ``codebook``: a weight as its codes in uint2, uint4, uint8 or uint16, and a Gather over its codebook.

``Gather(codebook, Cast(codes))`` hangs on constants alone, so onnxruntime computes it when it loads the file: float speed at run time,
while the file holds the codes.
"""

import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter, integer_tensor
from diffq_fx.export.onnx.layout.stored import restore_rows
from diffq_fx.storage.codebook import CodebookWeight


def emit_looked_up(emit: Emitter, weight: CodebookWeight, container: int) -> tuple[ir.Value, ir.Value]:
    """Write the codes, the codebook and what makes the float weight of them; gives that, as PyTorch has it, and the codes."""
    spec, codes_OC = weight.spec, weight.codes_OC().cpu().numpy()
    codes = emit.initializer(f"{spec.name}.codes", integer_tensor(codes_OC, container, signed=False))
    index = emit.cast(codes, ir.DataType.INT32)
    value = emit.op("Gather", [_entries(emit, weight), index])  # (O, C, D)
    filled = codes_OC.shape[1] * weight.block_size
    if filled > spec.columns:
        value = emit.op("Reshape", [value, emit.sizes(spec.rows, filled)])
        value = emit.op("Slice", [value, *(emit.sizes(bound) for bound in (0, spec.columns, 1))])
    return restore_rows(emit, value, spec), codes


def _entries(emit: Emitter, weight: CodebookWeight) -> ir.Value:
    """The codebook in float, shape (K, D): as it is, cast from float16, or int8 times its scale."""
    name = weight.spec.name
    entries = emit.cast(emit.initializer(f"{name}.codebook", weight.codebook.cpu().numpy()), ir.DataType.FLOAT)
    if weight.scale is None:
        return entries
    return emit.op("Mul", [entries, emit.initializer(f"{name}.codebook.scale", weight.scale.cpu().numpy())])
