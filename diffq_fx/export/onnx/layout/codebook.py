"""The rule ``codebook``: a weight as its codes in uint2, uint4, uint8 or uint16, and a Gather over its codebook.

``Gather(codebook, Cast(codes))`` hangs on constants alone, so onnxruntime computes it when it loads the file: float speed at run time,
while the file holds the codes.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.export.onnx.layout.tensors import integer_tensor
from diffq_fx.export.onnx.metadata import WeightRecord
from diffq_fx.storage.codebook import CodebookWeight


def emit_looked_up(emitter: Emitter, weight: CodebookWeight) -> tuple[ir.Value, WeightRecord]:
    """Write the codes, the codebook and the nodes that make the float weight.

    Args:
        emitter: where to.
        weight: any codebook.

    Returns:
        The weight in PyTorch's shape and type, and its record.
    """
    spec, name = weight.spec, weight.spec.name
    codes = emitter.initializer(f"{name}.codes", integer_tensor(weight.codes_OC().cpu().numpy(), weight.container_bits, signed=False))
    index = emitter.op("Cast", [codes], f"{name}.index", dtype=ir.DataType.INT32, to=int(ir.DataType.INT32))
    value = emitter.op("Gather", [_entries(emitter, weight), index], f"{name}.blocks", dtype=ir.DataType.FLOAT, axis=0)  # (O, C, D)
    filled = weight.codes_OC().shape[1] * weight.block_size
    if filled > spec.columns:
        value = _reshaped(emitter, value, f"{name}.filled", [spec.rows, filled])
        bounds = [_sizes(emitter, f"{name}.rows.{part}", [n]) for part, n in (("start", 0), ("stop", spec.columns), ("axis", 1))]
        value = emitter.op("Slice", [value, *bounds], f"{name}.rows")
    value = _reshaped(emitter, value, f"{name}.moved", [spec.shape[spec.axis], *(n for i, n in enumerate(spec.shape) if i != spec.axis)])
    if spec.axis:
        back = [*range(1, spec.axis + 1), 0, *range(spec.axis + 1, len(spec.shape))]
        value = emitter.op("Transpose", [value], f"{name}.restored", perm=back)
    dtype = from_torch_dtype(spec.dtype)
    if dtype != ir.DataType.FLOAT:
        value = emitter.op("Cast", [value], f"{name}.{dtype.name.lower()}", dtype=dtype, to=int(dtype))
    return value, _record(weight, str(codes.name))


def _entries(emitter: Emitter, weight: CodebookWeight) -> ir.Value:
    """The codebook in float, shape (K, D): as it is, cast from float16, or int8 times its scale."""
    name = weight.spec.name
    codebook = emitter.initializer(f"{name}.codebook", weight.codebook.cpu().numpy())
    if codebook.dtype == ir.DataType.FLOAT:
        return codebook
    entries = emitter.op("Cast", [codebook], f"{name}.codebook.float", dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    if weight.scale is None:
        return entries
    scale = emitter.initializer(f"{name}.codebook.scale", weight.scale.cpu().numpy())
    return emitter.op("Mul", [entries, scale], f"{name}.codebook.scaled")


def _reshaped(emitter: Emitter, value: ir.Value, name: str, shape: list[int]) -> ir.Value:
    return emitter.op("Reshape", [value, _sizes(emitter, f"{name}.shape", shape)], name)


def _sizes(emitter: Emitter, name: str, sizes: list[int]) -> ir.Value:
    return emitter.initializer(name, np.array(sizes, dtype=np.int64))


def _record(weight: CodebookWeight, initializer: str) -> WeightRecord:
    spec = weight.spec
    return WeightRecord(
        name=spec.name,
        aliases=spec.aliases,
        shape=spec.shape,
        axis=spec.axis,
        grid="codebook",
        bits=weight.footprint().histogram,
        containers={weight.container_bits: weight.num_codes},
        rule="codebook",
        reason="a codebook: onnxruntime looks it up when it loads the file, and computes in float",
        initializers=(initializer,),
    )
