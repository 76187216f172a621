"""The rule ``dynamic``: a product of integer weights with activations that are rounded to uint8 at every run.

``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(scales) (-> Add(bias))``, which onnxruntime fuses to DynamicQuantizeMatMul. The
levels lie in the file in their own containers and are cast to 8 bits, and joined, when it is loaded. A static range for the activations
(QGemm, MatMulIntegerToFloat) was measured to be no faster, so that linear layers never need one.

Shape legend: K inputs, N output channels.
"""

import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import LinearUse
from diffq_fx.export.onnx.layout.emitter import Emitter, make_node
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.linear import replace_product
from diffq_fx.export.onnx.layout.products import Factor
from diffq_fx.export.onnx.layout.request import Twin
from diffq_fx.export.onnx.layout.stored import StoredTable


def emit_dynamic(stored: StoredTable, factor: Factor, use: LinearUse, twin: Twin = None) -> None:
    """Replace a product with a weight that is stored [K, N], one scale per output channel or one in all; with a float one for a twin."""
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
