"""The rule ``dynamic``: a product of integer weights with activations that are rounded to uint8 at every run.

``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(scales) (-> Add(bias))``, which onnxruntime fuses to DynamicQuantizeMatMul. The
levels lie in the file in their own containers and are cast to 8 bits, and joined, when it is loaded. A static range for the activations
(QGemm, MatMulIntegerToFloat) was measured to be no faster, so that linear layers never need one.

Shape legend: K inputs, N output channels.
"""

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import LinearUse
from diffq_fx.export.onnx.layout.emitter import make_node
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.products import Factor
from diffq_fx.export.onnx.layout.stored import StoredTable


def emit_dynamic(stored: StoredTable, factor: Factor, use: LinearUse, *, in_float: bool) -> None:
    """Replace a product.

    Args:
        stored: the weight, its storage [K, N], one scale per output channel or one in all.
        factor: what is multiplied, from :func:`emit_factor`.
        use: the product.
        in_float: leave the activations as they are: the same numbers otherwise, for the comparison with PyTorch.
    """
    name = stored.name if use.rows is None else f"{stored.name}.{use.rows.start}_{use.rows.stop}"
    levels = _some(stored, factor.levels, f"{name}.levels", 1, use.rows)
    scale = _per_output(stored, factor.scale, f"{name}.scale.flat", use.rows)
    zero_point = None
    if factor.zero_point is not None:
        zero_point = _per_output(stored, factor.zero_point, f"{name}.zero_point.flat", use.rows)
    emit = _float_nodes if in_float else _integer_nodes
    nodes = emit(stored, use, levels, zero_point, scale)
    if use.bias is not None:
        nodes.append(make_node("Add", [nodes[-1].outputs[0], use.bias], stored.emit.unique(f"{name}.biased")))
    ir.convenience.replace_nodes_and_values(use.graph, use.node, [use.node], nodes, [use.node.outputs[0]], [nodes[-1].outputs[0]])


def _integer_nodes(stored: StoredTable, use: LinearUse, levels: ir.Value, zero_point: ir.Value | None, scale: ir.Value) -> list[ir.Node]:
    def named(label: str) -> str:
        return stored.emit.unique(f"{stored.name}.{label}")

    rounded = ir.node("DynamicQuantizeLinear", [use.activation], num_outputs=3)
    rounded.name = named("activation")
    for output, label in zip(rounded.outputs, ("levels", "scale", "zero_point"), strict=True):
        output.name = f"{rounded.name}.{label}"
    activation, activation_scale, activation_zero_point = rounded.outputs
    factors = [activation, levels, activation_zero_point, *([] if zero_point is None else [zero_point])]
    product = make_node("MatMulInteger", factors, named("product.int32"))
    in_float = make_node("Cast", [product.outputs[0]], named("product.unscaled"), to=int(ir.DataType.FLOAT))
    scales = make_node("Mul", [activation_scale, scale], named("product.scale"))
    scaled = make_node("Mul", [in_float.outputs[0], scales.outputs[0]], named("product"))
    mark_weight(scaled.outputs[0], stored.name, "DynamicQuantizeMatMul", activation=use.activation)
    return [rounded, product, in_float, scales, scaled]


def _float_nodes(stored: StoredTable, use: LinearUse, levels: ir.Value, zero_point: ir.Value | None, scale: ir.Value) -> list[ir.Node]:
    weight = stored.cast(levels, ir.DataType.FLOAT, f"{stored.name}.float")
    if zero_point is not None:
        offset = stored.cast(zero_point, ir.DataType.FLOAT, f"{stored.name}.zero_point.float")
        weight = stored.emit.op("Sub", [weight, offset], f"{stored.name}.centred")
    weight = stored.emit.op("Mul", [weight, scale], f"{stored.name}.scaled")
    return [make_node("MatMul", [use.activation, weight], stored.emit.unique(f"{stored.name}.product"))]


def _per_output(stored: StoredTable, values: ir.Value, name: str, rows: range | None) -> ir.Value:
    """Scales or zero points as one line of N values, or of one."""
    flat = stored.emit.op("Reshape", [values, stored.sizes("flat", [-1])], name)
    return flat if stored.table.is_per_tensor else _some(stored, flat, name, 0, rows)


def _some(stored: StoredTable, values: ir.Value, name: str, axis: int, rows: range | None) -> ir.Value:
    if rows is None:
        return values
    bounds = {"start": rows.start, "stop": rows.stop, "axis": axis}
    sizes = [stored.emit.initializer(f"{name}.{label}", np.array([bound], dtype=np.int64)) for label, bound in bounds.items()]
    return stored.emit.op("Slice", [values, *sizes], f"{name}.part")
