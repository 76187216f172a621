"""The rule ``int8``: convolutions of weights and static uint8 activations in 8 bits (onnxruntime's QLinearConv); and BatchNorms behind one.

``gamma * (w x + b - mean) / sqrt(variance + epsilon) + beta``: each output channel's scale is multiplied by its factor, the integers stay
as they are. onnxruntime does this itself for float convolutions, not for integer ones; and the file is smaller by three numbers a channel.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import Uses
from diffq_fx.export.onnx.layout.emitter import Emitter, constant_of, only_reader, take_place
from diffq_fx.export.onnx.layout.products import MAX_INPUTS, Form, choose_form, emit_factor
from diffq_fx.export.onnx.layout.request import LayoutRequest, Range
from diffq_fx.export.onnx.layout.rounding import MOVING, grid
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable

_MIN_GROUP = 32
"""Channels a group from which int8 was measured to be faster than float: 1.3 to 5 times slower below, but for depthwise convolutions."""
_MANY_INPUTS = 256
"""Inputs of a filter from which a product of matrices is faster than the kernel for zero points of 0."""
_MAX_BIAS_STEPS = 2.0**30
"""A bias is rounded to int32 steps of the product of both scales."""


def fold_batch_norm(emitter: Emitter, table: WeightTable, node: ir.Node, halved: Set[str]) -> WeightTable:
    """Put the BatchNormalization that alone reads a convolution, which alone reads a weight without blocks, into scales and bias.

    ``halved`` initializers will be float16 in the file. Gives the weight as it was if there is no such BatchNormalization, or not in
    float32.
    """
    if str(table.spec.dtype) != "torch.float32":
        return table
    norm = only_reader(node.outputs[0])
    if norm is None or norm.op_type != "BatchNormalization":
        return table
    parameters = [_as_stored(value, halved) for value in norm.inputs[1:5]]
    old_bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias = np.zeros(table.spec.rows) if old_bias is None else _as_stored(old_bias, halved)
    gamma, beta, mean, variance = parameters
    if gamma is None or beta is None or mean is None or variance is None or bias is None:
        return table
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    new_bias = emitter.initializer(f"{table.spec.name}.bias", ((bias - mean) * factor + beta).astype(np.float32))
    node.resize_inputs(3)
    node.replace_input_with(2, new_bias)
    take_place(node.outputs[0], norm.outputs[0], "normalized")
    emitter.graph.remove(norm, safe=True)
    table = table.per_channel()
    return replace(table, scale=(table.scale * factor[:, None]).astype(np.float32))


def _as_stored(value: ir.Value | None, halved: Set[str]) -> np.ndarray | None:
    array = constant_of(value)
    if array is None or value is None:
        return None
    return (array.astype(np.float16) if value.name in halved else array).astype(np.float64)


def choose_convolutions(table: WeightTable, uses: Uses, request: LayoutRequest) -> tuple[WeightTable, dict[ir.Node, str | None]]:
    """Choose which convolutions become integer ones.

    Returns:
        The weight with a scale for each channel, and each Conv -> why it cannot be an integer one, None if it can. As it was, and nothing,
        where none is asked for.
    """
    if request.activations != "int8" or not uses.convolutions or table.spec.name in request.refused:
        return table, {}
    if table.blocks == 1:
        table = _without_empty_scales(table.per_channel())
    return table, {node: _refusal(table, node, request.ranges or {}) for node in uses.convolutions}


def _refusal(table: WeightTable, node: ir.Node, ranges: Mapping[str, Range]) -> str | None:
    if table.kernel_bits > ir.DataType.INT8.bitwidth:
        return f"int8 convolutions take up to 8 bits, {table.widest}"
    if table.blocks > 1:
        return f"blocks of {table.block} inputs: an int8 convolution has one scale per channel"
    if (inputs := math.prod(table.spec.shape[1:])) > MAX_INPUTS:
        return f"{inputs} inputs of a filter: int32 holds the sum of {MAX_INPUTS} products of 8 bits"
    groups = node.attributes.get_int("group", 1)
    narrow = min(table.spec.shape[0] // groups, table.spec.shape[1])
    if groups > 1 and narrow < _MIN_GROUP and not _is_depthwise(table, node):
        return f"{groups} groups of {narrow} channels: onnxruntime's int8 kernel is slower than float below {_MIN_GROUP} channels a group"
    if str(table.spec.dtype) != "torch.float32":
        return f"the model computes in {table.spec.dtype}, onnxruntime's int8 convolution gives float32"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    numbers, known = constant_of(bias), _range_of(node.inputs[0], ranges)
    if bias is not None and numbers is None:
        return "its bias is computed by the graph"
    if numbers is None or known is None:
        return None
    steps = np.abs(numbers / (np.float64(grid(known)[0]) * table.scale[:, 0]))
    worst = int(steps.argmax())
    if steps[worst] <= _MAX_BIAS_STEPS:
        return None
    return f"the bias of channel {worst} is {steps[worst]:.2g} int32 steps: its weights are too small"


def _range_of(value: ir.Value | None, ranges: Mapping[str, Range]) -> Range | None:
    """The calibrated range of a value, or of the one that it was moved from."""
    while value is not None and value.name not in ranges:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in MOVING else None
    return None if value is None else ranges[str(value.name)]


def _without_empty_scales(table: WeightTable) -> WeightTable:
    """A table whose channels of scale 0, as a BatchNorm with gamma 0 leaves them, have the largest scale and zeros."""
    empty = table.scale == 0
    largest = float(np.abs(table.scale).max()) or 1.0
    scale = np.where(empty, np.float32(largest), table.scale)
    if table.zero_point is None:
        return replace(table, levels=np.where(empty, 0, table.levels), scale=scale)
    factor = 1 if table.factor is None else table.factor
    zeros = np.where(empty, table.zero_point // factor * factor, table.zero_point)  # no level lies at a half-integer
    return replace(table, levels=np.where(empty, zeros, table.levels), scale=scale, zero_point=zeros)


def _is_depthwise(table: WeightTable, node: ir.Node) -> bool:
    """Whether every channel is filtered by itself: onnxruntime (1.31) is fast for that with zero points of 0.

    The same other one for all channels takes a tenth more, different ones 10 to 40 times as long.
    """
    return node.attributes.get_int("group", 1) == table.spec.shape[0] and table.spec.shape[1] == 1


def form_of_filters(table: WeightTable, nodes: Sequence[ir.Node]) -> Form:
    """How the filters of some integer convolutions are multiplied.

    onnxruntime (1.31) has a kernel for zero points of 0; any other one sends filters to its product of matrices, which is faster for
    filters of many inputs and slower for those of few: ``benchmarks/integer_convolutions.py`` measures both, and its result is that of a
    processor with AMX. Depthwise filters need one zero point for all channels.
    """
    if any(_is_depthwise(table, node) for node in nodes):
        return choose_form(table, "equal")
    has_few_inputs = math.prod(table.spec.shape[1:]) < _MANY_INPUTS
    return choose_form(table, "any" if has_few_inputs else "moved")


def emit_filters(stored: StoredTable, form: Form) -> ir.Value:
    """Write a weight with one scale per output channel: a DequantizeLinear of int8 or uint8, which onnxruntime fuses."""
    levels, zero_point, scale = emit_factor(stored, form)
    flat = [stored.emit.op("Reshape", [part, stored.emit.sizes(-1)]) for part in (scale, zero_point) if part is not None]
    return stored.emit.op("DequantizeLinear", [levels, *flat], f"{stored.name}.dequantized", dtype=ir.DataType.FLOAT, axis=0)
