"""Relu and Clip behind a fused product, written so that onnxruntime still fuses it.

onnxruntime (1.31) takes a Relu or Clip behind ``DequantizeLinear -> MatMul`` or Gemm for part of a quantized group, finds no
QuantizeLinear behind it and gives up: the weight would be dequantized at every run. Max and Min compute the same at the same speed.
"""

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter, make_node


def spell_out_activation(emitter: Emitter, product: ir.Value) -> None:
    """Replace the Relu or Clip that alone reads a product, or its bias Add, by Max and Min.

    Args:
        emitter: of the graph.
        product: output of a fused MatMul.
    """
    reader = _only_reader(product)
    if reader is not None and reader.op_type == "Add":
        reader = _only_reader(reader.outputs[0])
    if reader is None or reader.graph is None or reader.domain or reader.op_type not in ("Relu", "Clip"):
        return
    if reader.op_type == "Relu":
        bounds = [("Max", emitter.initializer("zero", np.float32(0)))]
    else:
        given = [*reader.inputs[1:], None, None][:2]
        bounds = [(op, bound) for op, bound in zip(("Max", "Min"), given, strict=True) if bound is not None]
    value = reader.inputs[0]
    new = []
    for op_type, bound in bounds:
        new.append(make_node(op_type, [value, bound], emitter.unique(f"{reader.outputs[0].name}.{op_type.lower()}")))
        value = new[-1].outputs[0]
    if new and value is not None:
        graph, old = reader.graph, reader.outputs[0]
        ir.convenience.replace_nodes_and_values(graph, reader, [reader], new, [old], [value])


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None
