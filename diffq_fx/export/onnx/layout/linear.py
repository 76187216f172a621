"""The rule ``linear``: a product that onnxruntime fuses with the integers of its weight (MatMulNBits).

What it fuses is ``DequantizeLinear(levels [K, N], axis 0, block_size B) -> MatMul``, with B a power of two from 16 to 256. The file
holds one scale per channel all the same: it is repeated for each block by an Expand that is folded at load. The
kernel computes with 2, 4 or 8 bits. 2 and 4 bits need the container itself as an initializer ("native"); 8 bits take any
mix of narrower containers, cast and joined at load ("bytes"), for onnxruntime folds into types of 8 bits or more alone.

Shape legend: M rows, K inputs, N output channels, B block_size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.activations import spell_out_activation
from diffq_fx.export.onnx.layout.consumers import LinearUse
from diffq_fx.export.onnx.layout.cost import FLOAT, Choice, Kernel, KernelName, Machines, Product, choose
from diffq_fx.export.onnx.layout.emitter import make_node
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.products import choose_form
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import Storage, WeightTable
from diffq_fx.export.onnx.layout.tensors import integer_tensor, integer_type

_MIN_BLOCK = 16
_MAX_BLOCK = {2: 128, 4: 256, 8: 256}
"""The longest block that the kernel of a width is fast at: at 2 bits and 256 it runs 10 to 20 times slower than float. At the default
accuracy_level a block also shares the scale of the activations: 256 has 1.4 times the error of 32, 2.7 times with strong outliers."""
_SLOW = Kernel("fused 2", 16)
"""Runs 10 to 20 times slower than float."""
_NATIVE: Mapping[int | None, KernelName] = {2: "fused 2", 4: "fused 4"}
"""Containers that the kernel of the same width reads as they are."""
TWO_BIT_ALIGNMENT = 4
"""onnxruntime (1.31) computes a *wrong* product for a fused 2-bit [K, N] weight unless N is a multiple of this: it reads each
packed row as if it began at a byte."""
BLOCKED_OPSET = 21
"""The first opset whose DequantizeLinear has blocks, which every fused product needs."""
_BYTE = 8
_MAX_PADDING = 0.125


Mode = Literal["native", "bytes", "dynamic", "float"]


@dataclass(frozen=True)
class Fusion:
    """How a product runs."""

    mode: Mode
    choice: Choice

    @property
    def bits(self) -> int:
        """The width that a fused kernel computes with."""
        return int(self.choice.kernel.name.removeprefix("fused "))

    @property
    def block(self) -> int:
        """Inputs that share a scale in a fused kernel."""
        return self.choice.kernel.block

    @property
    def reason(self) -> str | None:
        """Why the product stays a float one; None where it is fused."""
        return self.choice.reason if self.mode == "float" else None


def in_float(reason: str) -> Fusion:
    """A product that must stay a float one, whatever it costs."""
    return Fusion("float", Choice(FLOAT, reason))


def choose_fusion(
    table: WeightTable,
    storage: Storage,
    use: LinearUse,
    product: Product,
    machines: Machines,
    *,
    shared: bool,
    dynamic: bool,
    blocked: bool,
) -> Fusion:
    """Choose the fastest way to run a product from a given storage.

    Args:
        table: the weight.
        storage: how the file would hold it.
        use: the product.
        product: the same as a machine sees it.
        machines: what tells the times.
        shared: whether another product has the initializers for itself already; this one then works on a copy in bytes.
        dynamic: whether activations may be rounded to int8 in the graph.
        blocked: whether the opset has what fused products need.

    Returns:
        The way; "float" with the reason where no other one is faster.
    """
    reason = refusal(table, use) or _wrong_form(table, storage, use)
    if reason is not None:
        return in_float(reason)
    modes = _kernels(table, use, product, dynamic=dynamic, blocked=blocked)
    if not modes:
        return in_float(f"the opset that was asked for has no DequantizeLinear with blocks: fused products need {BLOCKED_OPSET}")
    native = None if shared else _NATIVE.get(storage.width)
    here = [kernel for kernel, mode in modes.items() if mode != "native" or kernel.name == native]
    choice = choose(here, product, machines(product, tuple(modes)))
    return Fusion(modes.get(choice.kernel, "float"), choice)


def _kernels(table: WeightTable, use: LinearUse, product: Product, *, dynamic: bool, blocked: bool) -> dict[Kernel, Mode]:
    """The kernels that could run a product in one storage or another, the narrowest first."""
    kernels: dict[Kernel, Mode] = {}
    bits = table.container_bits
    if bits in _NATIVE and use.rows is None and (bits != 2 or product.outputs % TWO_BIT_ALIGNMENT == 0):
        kernels[Kernel(_NATIVE[bits], _kernel_block(table, bits))] = "native"
    kernels[Kernel("fused 8", _kernel_block(table, _BYTE))] = "bytes"
    if dynamic and table.blocks == 1:
        kernels[Kernel("dynamic int8" if choose_form(table).dtype == ir.DataType.INT8 else "dynamic uint8")] = "dynamic"
    return {kernel: mode for kernel, mode in kernels.items() if kernel != _SLOW and (blocked or not kernel.block)}


def refusal(table: WeightTable, use: LinearUse) -> str | None:
    """Why a product can not be fused in any storage, None if it can."""
    if str(table.spec.dtype) != "torch.float32":
        return f"the model computes in {table.spec.dtype}, onnxruntime fuses float32"
    if table.container_bits > _BYTE:
        return f"onnxruntime fuses up to 8 bits, the widest channel has {max(table.bits)}"
    if not table.is_per_tensor and use.channel_axis != table.spec.axis:
        return f"scales lie along the inputs of this {use.node.op_type} (axis={table.spec.axis}), not along its outputs"
    if table.blocks > 1 and _power_of_two_in(table.block) < _MIN_BLOCK:
        return f"blocks of {table.block} inputs: onnxruntime fuses multiples of {_MIN_BLOCK}"
    return None


def _wrong_form(table: WeightTable, storage: Storage, use: LinearUse) -> str | None:
    shape = table.stored_shape(storage.form)
    stored_as_kn = len(shape) == 2 and (storage.form == "transposed") == use.transposed
    return None if stored_as_kn else "another reader has the weight stored the other way round"


def _kernel_block(table: WeightTable, bits: int) -> int:
    """The longest block that the kernel takes, the scales allow, and that fills up the inputs by no more than an eighth."""
    longest = _MAX_BLOCK[bits]
    if table.blocks > 1:
        return min(longest, _power_of_two_in(table.block))
    inputs = table.spec.columns
    choices = [block for block in (256, 128, 64, 32, 16) if block <= longest]
    padding = {block: -(-inputs // block) * block - inputs for block in choices}
    fitting = [block for block in choices if padding[block] <= _MAX_PADDING * inputs]
    return fitting[0] if fitting else min(choices, key=lambda block: padding[block])


def _power_of_two_in(number: int) -> int:
    return number & -number


def emit_fused(stored: StoredTable, use: LinearUse, fusion: Fusion, copy: int) -> None:
    """Replace a product by ``DequantizeLinear -> MatMul (-> Add)``.

    Args:
        stored: the weight, its storage [K, N].
        use: the product.
        fusion: from :func:`choose_fusion`, not "float".
        copy: how many products read this weight before this one.
    """
    length = -(-stored.table.spec.columns // fusion.block)
    scale = stored.along_inputs(stored.scale, f"scale.per_{fusion.block}", block=fusion.block, length=length)
    if fusion.mode == "native":
        levels, zero_point = stored.parts[fusion.bits], _native_zero_point(stored, fusion, length)
    else:
        levels, zero_point = _byte_levels(stored), _byte_zero_point(stored, fusion, length)
    inputs = [levels, scale] if zero_point is None else [levels, scale, zero_point]
    name = stored.name if use.rows is None else f"{stored.name}.{use.rows.start}_{use.rows.stop}"
    if use.rows is not None or copy:
        labels = ("levels", "scale", "zero_point")
        inputs = [_own(stored, value, f"{name}.{label}", use.rows, copy) for value, label in zip(inputs, labels)]  # noqa: B905
    weight = stored.emit.op("DequantizeLinear", inputs, f"{name}.dequantized", dtype=ir.DataType.FLOAT, axis=0, block_size=fusion.block)
    mark_weight(weight, stored.name)
    product = replace_product(use, weight, stored.emit.unique(f"{name}.product"))
    spell_out_activation(stored.emit, product)


def _byte_levels(stored: StoredTable) -> ir.Value:
    return stored.levels_as(integer_type(_BYTE, signed=stored.table.signed))


def _native_zero_point(stored: StoredTable, fusion: Fusion, length: int) -> ir.Value | None:
    """Zero points of each block as an initializer: onnxruntime cannot fold an Expand of 2 or 4 bits."""
    zero_point_RC = stored.table.zero_point
    if zero_point_RC is None:
        return None
    blocks = np.minimum(np.arange(length) * fusion.block // stored.table.block, stored.table.blocks - 1)
    values = np.broadcast_to(zero_point_RC[:, blocks], (stored.table.spec.rows, length))
    matrix = values if stored.axis == 0 else values.T
    name = f"{stored.name}.zero_point.per_{fusion.block}"
    return stored.emit.initializer(name, integer_tensor(matrix, fusion.bits, signed=False))


def _byte_zero_point(stored: StoredTable, fusion: Fusion, length: int) -> ir.Value | None:
    if stored.zero_point is None:
        return None
    as_bytes = stored.cast(stored.zero_point, ir.DataType.UINT8, f"{stored.name}.zero_point.uint8")
    return stored.along_inputs(as_bytes, f"zero_point.per_{fusion.block}", block=fusion.block, length=length)


def _own(stored: StoredTable, values: ir.Value, name: str, rows: range | None, copy: int) -> ir.Value:
    """Some or all output channels of a [K, N] matrix as a constant of its own.

    onnxruntime fuses no DequantizeLinear that shares an initializer with another one, and merges equal nodes. A Slice whose end lies
    beyond the matrix by another number each time copies everything, and equals no other.
    """
    rows = range(stored.table.spec.rows) if rows is None else rows
    bounds = {"start": [0, rows.start], "stop": [stored.table.spec.columns + copy, rows.stop], "axes": [0, 1]}
    sizes = [stored.emit.initializer(f"{name}.{label}", np.array(bound, dtype=np.int64)) for label, bound in bounds.items()]
    return stored.emit.op("Slice", [values, *sizes], name)


def replace_product(use: LinearUse, weight: ir.Value, name: str) -> ir.Value:
    """Put ``MatMul(activation, weight) (+ bias)`` in the place of a MatMul or Gemm.

    Args:
        use: the product to replace.
        weight: float, [K, N].
        name: of the new MatMul.

    Returns:
        The output of the MatMul.
    """
    new = [make_node("MatMul", [use.activation, weight], name)]
    if use.bias is not None:
        new.append(make_node("Add", [new[0].outputs[0], use.bias], f"{name}.biased"))
    old, result = use.node.outputs[0], new[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(use.graph, use.node, [use.node], new, [old], [result])
    return new[0].outputs[0]
