"""BatchNorm behind a convolution, put into the scales and the bias: the integers stay as they are.

``gamma * (w x + b - mean) / sqrt(variance + epsilon) + beta``: each output channel's scale is multiplied by its factor. onnxruntime does
this itself for float convolutions, not for integer ones; and the file is smaller by three numbers for each channel.

Shape legend: O output channels.
"""

from collections.abc import Set
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter, constant_of, describe_like, only_reader
from diffq_fx.export.onnx.layout.table import WeightTable

_PARAMETERS = 4


def fold_batch_norm(emitter: Emitter, table: WeightTable, node: ir.Node, halved: Set[str]) -> WeightTable:
    """Put the BatchNormalization that alone reads a convolution into its weight and bias.

    Args:
        emitter: of the graph, which is changed.
        table: the convolution's weight, without blocks.
        node: the only node that reads the weight.
        halved: initializers that the file will hold as float16.

    Returns:
        The weight with its new scales, one per channel; as it was if there is no such BatchNormalization, or not in float32.
    """
    if str(table.spec.dtype) != "torch.float32":
        return table
    norm = only_reader(node.outputs[0])
    if norm is None or norm.op_type != "BatchNormalization":
        return table
    parameters = [_constant(value, halved) for value in norm.inputs[1 : 1 + _PARAMETERS]]
    old_bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias = np.zeros(table.spec.rows) if old_bias is None else _constant(old_bias, halved)
    known = [value for value in (*parameters, bias) if value is not None]
    if len(known) != _PARAMETERS + 1:
        return table
    gamma, beta, mean, variance, bias = known
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    new_bias = emitter.initializer(f"{table.spec.name}.bias", ((bias - mean) * factor + beta).astype(np.float32))
    node.resize_inputs(3)
    node.replace_input_with(2, new_bias)
    old, new = norm.outputs[0], node.outputs[0]
    norm.replace_input_with(0, None)
    describe_like(new, old)
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.normalized", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if norm.graph is not None:
        norm.graph.remove(norm, safe=True)
    table = table.per_channel()
    return replace(table, scale=(table.scale * factor[:, None]).astype(np.float32))


def _constant(value: ir.Value | None, halved: Set[str]) -> np.ndarray | None:
    array = constant_of(value)
    if array is None or value is None:
        return None
    return (array.astype(np.float16) if value.name in halved else array).astype(np.float64)
