"""The rule ``linear``: a product that onnxruntime fuses with the integers of its weight (MatMulNBits).

What it fuses is ``DequantizeLinear(levels [K, N], axis 0, block_size B) -> MatMul``, with B a power of two from 16 to 256. The file
holds one scale per channel all the same: it is repeated for each block by an Expand that is folded at load. The
kernel computes with 2, 4 or 8 bits. 2 and 4 bits need the container itself as an initializer; 8 bits take any
mix of narrower containers, cast and joined at load, for onnxruntime folds into types of 8 bits or more alone. So half-integer zero points
are doubled for 8 bits; for 2 and 4 they are rounded down, and what that adds to a product is subtracted behind it.

Shape legend: M rows, K inputs, N output channels, B block_size.
"""

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import LinearUse, replace_product
from diffq_fx.export.onnx.layout.cost import FLOAT, Choice, Kernel, KernelName, Product, choose
from diffq_fx.export.onnx.layout.emitter import Emitter, integer_tensor, integer_type, make_node, only_reader, replace_node
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.products import MAX_INPUTS, choose_form
from diffq_fx.export.onnx.layout.request import BLOCKED_OPSET, LayoutRequest
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import Storage, WeightTable

_MIN_BLOCK = 16
_MAX_BLOCK = {2: 128, 4: 256, 8: 256}
"""The longest block that the kernel of a width is fast at: at 2 bits and 256 it runs 10 to 20 times slower than float. At the default
accuracy_level a block also shares the scale of the activations: 256 has 1.4 times the error of 32, 2.7 times with strong outliers."""
_SLOW = Kernel("fused 2", 16)
"""Runs 10 to 20 times slower than float."""
_NATIVE: dict[int, KernelName] = {2: "fused 2", 4: "fused 4"}
"""Containers that the kernel of the same width reads as they are."""
TWO_BIT_ALIGNMENT = 4
"""onnxruntime (1.31) computes a *wrong* product for a fused 2-bit [K, N] weight unless N is a multiple of this: it reads each
packed row as if it began at a byte."""
_BYTE = 8
_MAX_PADDING = 0.125


def choose_kernel(storage: Storage, use: LinearUse, request: LayoutRequest, *, shared: bool) -> Choice:
    """Choose the fastest way to run a product from a given storage; float with the reason where no other one is faster.

    ``shared``: another product has the initializers for itself already, and this one works on a copy in bytes.
    """
    table = storage.table
    reason = refusal(table, use)
    if reason is None and (len(storage.shape) != 2 or (storage.form == "transposed") != use.transposed):
        reason = "another reader has the weight stored the other way round"
    if reason is not None:
        return Choice(FLOAT, reason)
    outputs = table.spec.rows if use.rows is None else len(use.rows)
    product = Product(use.num_rows(request.sizes), table.spec.columns, outputs, use.is_open)
    kernels = _kernels(table, use, outputs, request)
    if not kernels:
        reason = f"the opset that was asked for has no DequantizeLinear with blocks: fused products need {BLOCKED_OPSET}"
        return Choice(FLOAT, reason)
    as_stored = not shared and storage.width == table.container_bits
    here = [kernel for kernel in kernels if as_stored or kernel.name not in _NATIVE.values()]
    return choose(here, product, request.machines(product, kernels))


def _kernels(table: WeightTable, use: LinearUse, outputs: int, request: LayoutRequest) -> tuple[Kernel, ...]:
    """The kernels that could run a product in one storage or another, the narrowest first."""
    kernels = []
    bits = table.container_bits
    if request.has_blocks:
        leaves_no_rest = table.factor is None or table.spec.columns % table.block == 0  # else :func:`_without_halves` has no sums of blocks
        if bits in _NATIVE and use.rows is None and (bits != 2 or outputs % TWO_BIT_ALIGNMENT == 0) and leaves_no_rest:
            kernels.append(Kernel(_NATIVE[bits], _kernel_block(table, bits)))
        kernels.append(Kernel("fused 8", _kernel_block(table, _BYTE)))
    if request.rounds and table.blocks == 1 and table.spec.columns <= MAX_INPUTS:
        kernels.append(Kernel("dynamic int8" if choose_form(table).dtype == ir.DataType.INT8 else "dynamic uint8"))
    return tuple(kernel for kernel in kernels if kernel != _SLOW)


def refusal(table: WeightTable, use: LinearUse) -> str | None:
    """Why a product can not be fused in any storage, None if it can."""
    if str(table.spec.dtype) != "torch.float32":
        return f"the model computes in {table.spec.dtype}, onnxruntime fuses float32"
    if table.kernel_bits > _BYTE:
        return f"onnxruntime fuses up to 8 bits, {table.widest}"
    if not table.is_per_tensor and use.channel_axis != table.spec.axis:
        return f"scales lie along the inputs of this {use.node.op_type} (axis={table.spec.axis}), not along its outputs"
    if table.blocks > 1 and table.block & -table.block < _MIN_BLOCK:  # the largest power of two in it
        return f"blocks of {table.block} inputs: onnxruntime fuses multiples of {_MIN_BLOCK}"
    return None


def _kernel_block(table: WeightTable, bits: int) -> int:
    """The longest block that the kernel takes, the scales allow, and that fills up the inputs by no more than an eighth."""
    longest = _MAX_BLOCK[bits]
    if table.blocks > 1:
        return min(longest, table.block & -table.block)
    inputs = table.spec.columns
    choices = [block for block in (256, 128, 64, 32, 16) if block <= longest]
    padding = {block: -(-inputs // block) * block - inputs for block in choices}
    fitting = [block for block in choices if padding[block] <= _MAX_PADDING * inputs]
    return fitting[0] if fitting else min(choices, key=lambda block: padding[block])


def emit_fused(stored: StoredTable, use: LinearUse, kernel: Kernel, copy: int) -> None:
    """Replace a product by ``DequantizeLinear -> MatMul (-> Add)``; ``copy`` products read this weight, stored [K, N], before this one."""
    length = -(-stored.table.spec.columns // kernel.block)
    in_bytes = kernel.bits == _BYTE
    scale = stored.along_inputs(stored.scale if in_bytes else stored.learned_scale, block=kernel.block, length=length)
    if in_bytes:
        levels = stored.levels_as(integer_type(_BYTE, signed=stored.table.signed))
        as_bytes = None if stored.zero_point is None else stored.emit.cast(stored.zero_point, ir.DataType.UINT8)
        zero_point = None if as_bytes is None else stored.along_inputs(as_bytes, block=kernel.block, length=length)
    else:
        levels, zero_point = stored.parts[kernel.bits], _native_zero_point(stored, kernel, length)
    inputs = [value for value in (levels, scale, zero_point) if value is not None]
    if use.rows is not None or copy:
        inputs = [_own(stored, value, use.rows, copy) for value in inputs]
    name = use.label(stored.name)
    weight = stored.emit.op("DequantizeLinear", inputs, f"{name}.dequantized", dtype=ir.DataType.FLOAT, axis=0, block_size=kernel.block)
    mark_weight(weight, stored.name)
    nodes = [make_node("MatMul", [use.activation, weight], stored.emit.unique(f"{name}.product"))]
    if not in_bytes and stored.storage.factor is not None:
        nodes = _without_halves(stored, use.activation, nodes[0])
    replace_product(use, nodes)
    _spell_out_activation(stored.emit, nodes[-1].outputs[0])


def _without_halves(stored: StoredTable, activation: ir.Value, product: ir.Node) -> list[ir.Node]:
    """A product with zero points that were rounded down, and what that has added: half a scale times the sum of the inputs of its block.

    ``x @ ((q - z - 1/2) s) = x @ ((q - z) s) - sum(x) s / 2``: so levels of 2 or 4 bits need not be doubled, for which the kernel of their
    width has no room.
    """
    table, emit, name = stored.table, stored.emit, str(product.outputs[0].name)
    _, is_half_RC = table.learned_zero_point
    halves = stored.storage.groups(np.zeros_like(table.scale, np.int32) if is_half_RC is None else is_half_RC)
    held = emit.initializer(f"{stored.name}.halves", integer_tensor(halves, stored.storage.part_bits, signed=False))
    is_half, nothing = emit.cast(emit.cast(held, ir.DataType.INT32), ir.DataType.BOOL), emit.initializer("nothing", np.float32(0))
    added = emit.op("Where", [is_half, stored.scale, nothing], dtype=ir.DataType.FLOAT)  # scales are halved where levels are doubled
    before, inputs = [], activation
    if table.blocks > 1 and activation.shape is not None:
        apart = emit.sizes(*[0] * (len(activation.shape) - 1), table.blocks, table.block)
        before = [make_node("Reshape", [activation, apart], f"{name}.blocks")]
        inputs = before[0].outputs[0]
    sums = make_node("ReduceSum", [inputs, emit.sizes(-1)], f"{name}.sums", keepdims=int(table.blocks == 1))
    rest = make_node("MatMul", [sums.outputs[0], added], f"{name}.halves")
    product.name = product.outputs[0].name = f"{name}.rounded_down"
    return [product, *before, sums, rest, make_node("Sub", [product.outputs[0], rest.outputs[0]], name)]


def _native_zero_point(stored: StoredTable, kernel: Kernel, length: int) -> ir.Value | None:
    """Zero points of each block as an initializer: onnxruntime cannot fold an Expand of 2 or 4 bits."""
    zero_point_RC = stored.table.zero_point if stored.storage.factor is None else stored.table.learned_zero_point[0]
    if zero_point_RC is None:
        return None
    blocks = np.minimum(np.arange(length) * kernel.block // stored.table.block, stored.table.blocks - 1)
    values = np.broadcast_to(zero_point_RC[:, blocks], (stored.table.spec.rows, length))
    matrix = values if stored.axis == 0 else values.T
    name = f"{stored.name}.zero_point.per_{kernel.block}"
    return stored.emit.initializer(name, integer_tensor(matrix, kernel.bits, signed=False))


def _own(stored: StoredTable, values: ir.Value, rows: range | None, copy: int) -> ir.Value:
    """Some or all output channels of a [K, N] matrix as a constant of its own.

    onnxruntime fuses no DequantizeLinear that shares an initializer with another one, and merges equal nodes. A Slice whose end lies
    beyond the matrix by another number each time copies everything, and equals no other.
    """
    rows = range(stored.table.spec.rows) if rows is None else rows
    bounds = [(0, rows.start), (stored.table.spec.columns + copy, rows.stop), (0, 1)]
    return stored.emit.op("Slice", [values, *(stored.emit.sizes(*bound) for bound in bounds)])


def _spell_out_activation(emitter: Emitter, product: ir.Value) -> None:
    """Replace the Relu or Clip that alone reads a fused product, or its bias Add, by Max and Min.

    onnxruntime (1.31) takes a Relu or Clip behind ``DequantizeLinear -> MatMul`` or Gemm for part of a quantized group, finds no
    QuantizeLinear behind it and gives up: the weight would be dequantized at every run. Max and Min compute the same at the same speed.
    """
    reader = only_reader(product)
    if reader is not None and reader.op_type == "Add":
        reader = only_reader(reader.outputs[0])
    if reader is None or reader.op_type not in ("Relu", "Clip"):
        return
    if reader.op_type == "Relu":
        bounds = [("Max", emitter.initializer("zero", np.float32(0)))]
    else:
        given = [*reader.inputs[1:], None, None][:2]
        bounds = [(op, bound) for op, bound in zip(("Max", "Min"), given, strict=True) if bound is not None]
    value, new = reader.inputs[0], []
    for op_type, bound in bounds:
        new.append(make_node(op_type, [value, bound], emitter.unique(f"{reader.outputs[0].name}.{op_type.lower()}")))
        value = new[-1].outputs[0]
    if new:
        replace_node(reader, new)
