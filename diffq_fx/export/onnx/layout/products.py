"""onnxruntime's integer products: levels in a form that is exact on every processor and for any activations, and the rule ``dynamic``.

onnxruntime (1.31) multiplies uint8 activations with int8 or uint8 weights. Its kernels for x86 without VNNI add two neighbouring
uint8 x int8 products in int16, which saturates (vpmaddubsw); its kernels for Arm without dot products add two int8 x int8 products in
int16, which overflows (smull, smlal). Both are exact for levels within +-64: ``2 * 255 * 64 = 32640`` fits int16. uint8 weights are
widened to int16 before they are multiplied, and summed in int32: any level is exact, but on x86 that takes longer.

So levels of up to 7 bits are moved to the middle of int8, their zero points alike, and levels of 8 bits are multiplied as uint8.

Shape legend: K inputs, N output channels.
"""

from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import LinearUse, replace_product
from diffq_fx.export.onnx.layout.emitter import Emitter, make_node
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.request import Twin
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable

EXACT_LEVEL = 64
"""int8 levels up to this size are multiplied without loss everywhere."""
MAX_INPUTS = (2**31 - 1) // 255**2
"""Inputs of one output up to which its int32 sum holds the products of any levels and activations of 8 bits."""
_MIDDLE_OF_UINT8 = 128

ZeroPoints = Literal["any", "equal", "moved"]
"""What a kernel is fast for: any zero points; one for all channels, at best 0; at least one that is not 0."""


class Factor(NamedTuple):
    """A weight as an integer kernel multiplies it."""

    levels: ir.Value
    """int8 or uint8, in the form of the storage."""
    zero_point: ir.Value | None
    """Of the levels' type and the scales' shape; None for zeros."""
    scale: ir.Value


class Form(NamedTuple):
    """How stored levels become those of a :class:`Factor`: ``levels - zero_point (if centred) - offset``, the zero points alike."""

    dtype: ir.DataType
    centred: bool
    offset: int


def is_exact(levels: np.ndarray) -> bool:
    """Whether products of these levels, int8 or uint8, with any activations of 8 bits do not saturate, whatever the processor.

    Their sums fit int32 up to ``MAX_INPUTS`` inputs.

    Example:
        >>> is_exact(np.array([-64, 64], np.int8)), is_exact(np.array([65], np.int8)), is_exact(np.array([255], np.uint8))
        (True, False, True)
    """
    return levels.dtype == np.uint8 or (levels.dtype == np.int8 and _fit(levels))


def _fit(levels: np.ndarray) -> bool:
    return bool(levels.size == 0 or (levels.min() >= -EXACT_LEVEL and levels.max() <= EXACT_LEVEL))


def choose_form(table: WeightTable, zero_points: ZeroPoints = "any") -> Form:
    """Choose the fastest exact form of a weight of up to 8 bits that has one zero point per row or one in all."""
    learned = np.zeros(1, np.int32) if table.zero_point is None else table.zero_point
    if zero_points != "moved" and _fit(table.levels - learned):
        return Form(ir.DataType.INT8, centred=True, offset=0)
    if zero_points == "equal" and (learned != learned.flat[0]).any():
        return Form(ir.DataType.UINT8, centred=True, offset=-_MIDDLE_OF_UINT8)
    middle = 0 if table.signed else EXACT_LEVEL
    for offset in (middle, middle - 1, middle + 1):
        if _fit(table.levels - offset) and (learned != offset).any():
            return Form(ir.DataType.INT8, centred=table.signed, offset=offset)
    return Form(ir.DataType.UINT8, centred=table.signed, offset=-_MIDDLE_OF_UINT8 if table.signed else 0)


def is_rounded_anew(table: WeightTable, form: Form) -> bool:
    """Whether a common zero point costs wider steps: in uint8, where the levels of a channel lie too unevenly about their own one."""
    return not table.signed and form.centred and form.dtype == ir.DataType.UINT8 and bool((table.int8_stretch > 1).any())


def emit_factor(stored: StoredTable, form: Form) -> Factor:
    """Write the nodes that make the levels of an integer product; onnxruntime computes them when it loads the file."""
    emit, scale, zero_point = stored.emit, stored.scale, stored.zero_point
    if zero_point is None or not form.centred:
        levels = stored.levels_as(ir.DataType.INT16 if form.offset else form.dtype)
    elif is_rounded_anew(stored.table, form):
        levels, scale = _rounded_anew(stored, zero_point)
    else:
        levels = stored.levels_as(ir.DataType.INT16)
        levels = emit.op("Sub", [levels, emit.cast(zero_point, ir.DataType.INT16)])
    levels = _moved(stored, levels, form)
    if zero_point is not None and not form.centred:
        return Factor(levels, _moved(stored, zero_point, form), scale)
    if form.offset == 0:
        return Factor(levels, None, scale)
    moved = stored.storage.groups(np.full(stored.table.scale.shape, -form.offset, form.dtype.numpy()))
    return Factor(levels, emit.initializer(f"{stored.name}.zero_point.moved", moved), scale)


def _moved(stored: StoredTable, values: ir.Value, form: Form) -> ir.Value:
    """Levels or zero points less the offset, in the type of the product."""
    if form.offset:
        offset = stored.emit.initializer(f"{stored.name}.offset", np.array(form.offset, dtype=np.int16))
        values = stored.emit.op("Sub", [stored.emit.cast(values, ir.DataType.INT16), offset])
    return stored.emit.cast(values, form.dtype)


def _rounded_anew(stored: StoredTable, zero_point: ir.Value) -> tuple[ir.Value, ir.Value]:
    """All levels about 0, and their scales: rounded to a wider step in the rows that do not fit."""
    emit = stored.emit
    stretch = emit.initializer(f"{stored.name}.stretch", stored.storage.groups(stored.table.int8_stretch))
    middle = emit.cast(zero_point, ir.DataType.FLOAT)
    centred = emit.op("Sub", [stored.levels_as(ir.DataType.FLOAT), middle])
    rounded = emit.op("Round", [emit.op("Div", [centred, stretch])])
    return emit.cast(rounded, ir.DataType.INT16), emit.op("Mul", [stored.scale, stretch])


def emit_dynamic(stored: StoredTable, factor: Factor, use: LinearUse, twin: Twin = None) -> None:
    """The rule ``dynamic``: replace a product with a weight that is stored [K, N], one scale per output channel or one in all.

    Its activations are rounded to uint8 at every run; for a twin the product is a float one.
    ``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(scales) (-> Add(bias))``, which onnxruntime fuses to DynamicQuantizeMatMul. The
    levels lie in the file in their own containers and are cast to 8 bits, and joined, when it is loaded. A static range for the
    activations (QGemm, MatMulIntegerToFloat) was measured to be no faster, so that linear layers never need one.
    """
    levels = _some(stored.emit, factor.levels, 1, use.rows)
    scale = _per_output(stored, factor.scale, use.rows)
    zero_point = None if factor.zero_point is None else _per_output(stored, factor.zero_point, use.rows)
    if twin:
        weight = stored.emit.cast(levels, ir.DataType.FLOAT)
        if zero_point is not None:
            weight = stored.emit.op("Sub", [weight, stored.emit.cast(zero_point, ir.DataType.FLOAT)])
        weight = stored.emit.op("Mul", [weight, scale])
        rounded = [ir.node("DynamicQuantizeLinear", [use.activation], num_outputs=3)] if twin == "rounded" else []
        rounded += [make_node("DequantizeLinear", each.outputs, stored.emit.unique(f"{stored.name}.rounded")) for each in rounded]
        activation = rounded[-1].outputs[0] if rounded else use.activation
        nodes = [*rounded, make_node("MatMul", [activation, weight], stored.emit.unique(f"{stored.name}.product"))]
    else:
        nodes = _integer_nodes(stored, use.activation, levels, zero_point, scale)
        mark_weight(nodes[-1].outputs[0], stored.name, "DynamicQuantizeMatMul", activation=(nodes[0], 0))
    replace_product(use, nodes)


def _integer_nodes(
    stored: StoredTable, activation: ir.Value, levels: ir.Value, zero_point: ir.Value | None, scale: ir.Value
) -> list[ir.Node]:
    name = stored.emit.unique(f"{stored.name}.product")
    rounded = ir.node("DynamicQuantizeLinear", [activation], num_outputs=3)
    rounded_levels, activation_scale, activation_zero_point = rounded.outputs
    product = make_node("MatMulInteger", [rounded_levels, levels, activation_zero_point, zero_point], f"{name}.int32")
    unscaled = make_node("Cast", product.outputs, f"{name}.unscaled", to=int(ir.DataType.FLOAT))
    scales = make_node("Mul", [activation_scale, scale], f"{name}.scale")
    return [rounded, product, unscaled, scales, make_node("Mul", [unscaled.outputs[0], scales.outputs[0]], name)]


def _per_output(stored: StoredTable, values: ir.Value, rows: range | None) -> ir.Value:
    """Scales or zero points as one line of N values, or of one."""
    flat = stored.emit.op("Reshape", [values, stored.emit.sizes(-1)])
    return flat if stored.table.is_per_tensor else _some(stored.emit, flat, 0, rows)


def _some(emit: Emitter, values: ir.Value, axis: int, rows: range | None) -> ir.Value:
    if rows is None:
        return values
    return emit.op("Slice", [values, *(emit.sizes(bound) for bound in (rows.start, rows.stop, axis))])
