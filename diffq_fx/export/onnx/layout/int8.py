"""The rule ``int8``: convolutions of weights and static uint8 activations in 8 bits (onnxruntime's QLinearConv).

Each value that an integer kernel reads or gives is rounded by ``QuantizeLinear -> DequantizeLinear``; onnxruntime fuses every kernel with
the pairs around it. The values are: what a convolution reads, what it gives, and whatever Add, Mul, Concat, Sigmoid, LeakyRelu or
pooling make of such values alone. A Relu or Clip behind one of them is the limit of the integers, and leaves the graph.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter, describe_like, make_node
from diffq_fx.export.onnx.layout.plan import Range
from diffq_fx.export.onnx.layout.products import Form, choose_form, emit_factor
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable

_COMPUTING = {"Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool"}
_MOVING = {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}
"""What gives out numbers that it has read: the same scale before and behind."""
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_LEVELS = 255
_MIN_GROUP = 32
"""Channels a group from which int8 was measured to be faster than float: 1.3 to 5 times slower below, but for depthwise convolutions."""
_MANY_INPUTS = 256
"""Inputs of a filter from which a product of matrices is faster than the kernel for zero points of 0."""
_MAX_BIAS_STEPS = 2.0**30
"""A bias is rounded to int32 steps of the product of both scales."""


@dataclass(frozen=True, eq=False)
class RoundedValue:
    """A value that becomes uint8."""

    value: ir.Value
    """Behind the Relu or Clip, if there is one."""
    limits: ir.Node | None
    """The Relu or Clip that the limits of the integers take the place of."""
    readers: tuple[ir.Node, ...] | None
    """The nodes that read integers; None for everything that reads the value."""
    source: ir.Value
    """The value whose range this one shares; itself where it has its own."""


def conv_refusal(table: WeightTable, node: ir.Node, ranges: Mapping[str, Range] | None) -> str | None:
    """Why a convolution cannot be an integer one, None if it can.

    Args:
        table: its weight.
        node: the Conv.
        ranges: name -> calibrated range; None before the calibration.
    """
    if table.container_bits > ir.DataType.INT8.bitwidth:
        return f"int8 convolutions take up to 8 bits, the widest channel has {max(table.bits)}"
    if table.blocks > 1:
        return f"blocks of {table.block} inputs: an int8 convolution has one scale per channel"
    groups = node.attributes.get_int("group", 1)
    narrow = min(table.spec.shape[0] // groups, table.spec.shape[1])
    if groups > 1 and narrow < _MIN_GROUP and not is_depthwise(table, node):
        return f"{groups} groups of {narrow} channels: onnxruntime's int8 kernel is slower than float below {_MIN_GROUP} channels a group"
    if str(table.spec.dtype) != "torch.float32":
        return f"the model computes in {table.spec.dtype}, onnxruntime's int8 convolution gives float32"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = ir.convenience.get_const_tensor(bias) if bias is not None else None
    if bias is not None and tensor is None:
        return "its bias is computed by the graph"
    known = _range_of(node.inputs[0], ranges or {})
    if tensor is None or known is None:
        return None
    steps = np.abs(tensor.numpy() / (np.float64(grid(known)[0]) * table.scale[:, 0]))
    worst = int(steps.argmax())
    if steps[worst] <= _MAX_BIAS_STEPS:
        return None
    return f"the bias of channel {worst} is {steps[worst]:.2g} int32 steps: its weights are too small"


def _range_of(value: ir.Value | None, ranges: Mapping[str, Range]) -> Range | None:
    """The calibrated range of a value, or of the one that it was moved from."""
    while value is not None and value.name not in ranges:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in _MOVING else None
    return None if value is None else ranges[str(value.name)]


def without_empty_scales(table: WeightTable) -> WeightTable:
    """A table whose channels of scale 0, as a BatchNorm with gamma 0 leaves them, have the largest scale and zeros."""
    empty = table.scale[:, 0] == 0
    if not empty.any():
        return table
    largest = float(np.abs(table.scale).max()) or 1.0
    zeros = 0 if table.zero_point is None else table.zero_point
    scale = np.where(empty[:, None], np.float32(largest), table.scale)
    return replace(table, levels=np.where(empty[:, None], zeros, table.levels), scale=scale)


def is_depthwise(table: WeightTable, node: ir.Node) -> bool:
    """Whether every channel is filtered by itself: onnxruntime (1.31) is fast for that with zero points of 0.

    The same other one for all channels takes a tenth more, different ones 10 to 40 times as long.
    """
    return node.attributes.get_int("group", 1) == table.spec.shape[0] and table.spec.shape[1] == 1


def form_of_filters(table: WeightTable, nodes: Sequence[ir.Node]) -> Form:
    """How the filters of integer convolutions are multiplied.

    onnxruntime (1.31) has a kernel for zero points of 0; any other one sends filters to its product of matrices, which is faster for
    filters of many inputs and slower for those of few: ``benchmarks/integer_convolutions.py`` measures both, and its result is that of a
    processor with AMX. Depthwise filters need one zero point for all channels.

    Args:
        table: the weight.
        nodes: the convolutions that read it.
    """
    if any(is_depthwise(table, node) for node in nodes):
        return choose_form(table, "equal")
    has_few_inputs = math.prod(table.spec.shape[1:]) < _MANY_INPUTS
    return choose_form(table, "any" if has_few_inputs else "moved")


def emit_filters(stored: StoredTable, form: Form) -> ir.Value:
    """Write the weight of integer convolutions: a DequantizeLinear of int8 or uint8, which onnxruntime fuses.

    Args:
        stored: the weight, one scale per output channel.
        form: from :func:`form_of_filters`.
    """
    levels, zero_point, scale = emit_factor(stored, form)
    flat = [stored.emit.op("Reshape", [scale, stored.sizes("flat", [-1])], f"{stored.name}.scale.flat")]
    if zero_point is not None:
        flat.append(stored.emit.op("Reshape", [zero_point, stored.sizes("flat", [-1])], f"{stored.name}.zero_point.flat"))
    return stored.emit.op("DequantizeLinear", [levels, *flat], f"{stored.name}.dequantized", dtype=ir.DataType.FLOAT, axis=0)


def find_rounded(graph: ir.Graph, convolutions: Set[ir.Node]) -> list[RoundedValue]:
    """Find the values to round.

    Args:
        graph: the main graph.
        convolutions: the Conv nodes that shall be integer ones.

    Returns:
        The values in the order of the graph.
    """
    found: dict[ir.Value, RoundedValue] = {}
    integer_nodes: set[ir.Node | None] = set(convolutions)
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node in convolutions:
            found.setdefault(inputs[0], RoundedValue(inputs[0], None, (), inputs[0]))
        elif node.domain or not inputs or not _reads_integers(node, inputs, found):
            continue
        integer_nodes.add(node)
        if node.op_type in _MOVING:
            output = node.outputs[0]
            found[output] = RoundedValue(output, None, None, found[inputs[0]].source)
        else:
            limits = _limits(node)
            output = limits.outputs[0] if limits is not None else node.outputs[0]
            found[output] = RoundedValue(output, limits, None, output)
    needed = []
    for rounded in reversed(found.values()):
        if _is_needed(rounded, integer_nodes):
            needed.append(rounded)
        else:
            integer_nodes -= {rounded.value.producer()}
    return [_with_readers(rounded, integer_nodes) for rounded in reversed(needed)]


def _reads_integers(node: ir.Node, inputs: Sequence[ir.Value], found: Mapping[ir.Value, RoundedValue]) -> bool:
    if node.op_type in _MOVING:
        return inputs[0] in found and len(node.outputs) == 1
    return node.op_type in _COMPUTING and all(value in found for value in inputs)


def _limits(node: ir.Node) -> ir.Node | None:
    """The Relu, or Clip to limits around 0, that alone reads a node."""
    output = node.outputs[0]
    readers = output.consumers()
    if len(readers) != 1 or output.is_graph_output() or readers[0].domain or readers[0].graph is not node.graph:
        return None
    if readers[0].op_type == "Relu":
        return readers[0]
    if readers[0].op_type != "Clip":
        return None
    bounds = [None if bound is None else ir.convenience.get_const_tensor(bound) for bound in [*readers[0].inputs[1:], None, None][:2]]
    given = [None if bound is None else float(bound.numpy()) for bound in bounds]
    if any(bound is not None and value is None for bound, value in zip(readers[0].inputs[1:], given)):  # noqa: B905
        return None
    return readers[0] if (given[0] or 0.0) <= 0.0 <= (given[1] if given[1] is not None else 0.0) else None


def _is_needed(rounded: RoundedValue, integer_nodes: Set[ir.Node | None]) -> bool:
    """Whether integers are of use here: what only moves them is not rounded again for float readers."""
    return rounded.source is rounded.value or any(reader in integer_nodes for reader in rounded.value.consumers())


def _with_readers(rounded: RoundedValue, integer_nodes: Set[ir.Node | None]) -> RoundedValue:
    """A value that no integer kernel has made is rounded for the integer kernels alone."""
    if rounded.readers is None:
        return rounded
    readers = tuple(reader for reader in rounded.value.consumers() if reader in integer_nodes)
    return RoundedValue(rounded.value, None, readers, rounded.source)


def watch(model: ir.Model, rounded: Sequence[RoundedValue]) -> dict[str, tuple[str, str]]:
    """Let a graph give out the range of each value that has one of its own.

    Args:
        model: changed in place.
        rounded: from :func:`find_rounded`.

    Returns:
        Name of the value -> names of the outputs with its least and its largest number.
    """
    names: dict[str, tuple[str, str]] = {}
    for place, entry in enumerate(rounded):
        if entry.source is not entry.value:
            continue
        pair = [make_node(op_type, [entry.value], f"diffq_fx.{label}.{place}", keepdims=0) for op_type, label in _REDUCTIONS]
        for node in pair:
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
            model.graph.append(node)
            model.graph.outputs.append(node.outputs[0])
        names[str(entry.value.name)] = (str(pair[0].outputs[0].name), str(pair[1].outputs[0].name))
    return names


_REDUCTIONS = (("ReduceMin", "min"), ("ReduceMax", "max"))


def grid(value_range: Range) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 levels that hold a range and 0.

    Example:
        >>> scale, zero_point = grid((-1.0, 3.0))
        >>> round(float(scale), 4), int(zero_point)
        (0.0157, 64)
    """
    low, high = min(value_range[0], 0.0), max(value_range[1], 0.0)
    scale = np.float32((high - low) / _LEVELS) or np.float32(1.0)
    return scale, np.uint8(np.clip(np.round(-low / float(scale)), 0, _LEVELS))


def round_values(emitter: Emitter, rounded: Sequence[RoundedValue], ranges: Mapping[str, Range]) -> None:
    """Put QuantizeLinear and DequantizeLinear behind each value.

    Args:
        emitter: of the graph, which is changed.
        rounded: from :func:`find_rounded`.
        ranges: name of each value that has a range of its own -> the range.
    """
    grids = {entry.source: grid(ranges[str(entry.source.name)]) for entry in rounded}
    constants = {
        source: [emitter.initializer(f"{source.name}.{label}", number) for label, number in zip(("scale", "zero_point"), pair, strict=True)]
        for source, pair in grids.items()
    }
    for entry in rounded:
        _round(emitter, entry, constants[entry.source])


def keep_in_float(emitter: Emitter, convolutions: Set[ir.Node]) -> None:
    """Put a Max in front of the QuantizeLinear of each product whose weight stays in float.

    onnxruntime (1.31) gives such a weight, between a DequantizeLinear and a QuantizeLinear, int8 levels of its own when it loads the file:
    one scale for all of it, up to 127. These saturate on x86 without VNNI, and are less exact everywhere.

    Args:
        emitter: of the graph, which is changed.
        convolutions: the Conv nodes that are integer ones.
    """
    lowest = None
    for node in list(emitter.graph):
        if node.op_type not in _PRODUCTS or node.domain or node in convolutions or not _hangs_on_integers(node.inputs[0]):
            continue
        readers = node.outputs[0].consumers()
        last = readers[0] if len(readers) == 1 and readers[0].op_type == "Add" else node  # onnxruntime makes a Gemm of MatMul and Add
        result = last.outputs[0]
        if not _leads_to_integers(result):
            continue
        lowest = lowest or emitter.initializer("lowest", np.finfo(np.float32).min)
        kept = make_node("Max", [result, lowest], emitter.unique(f"{result.name}.float"))
        describe_like(kept.outputs[0], result)
        for reader, index in [use for use in result.uses() if use[0] is not kept]:
            reader.replace_input_with(index, kept.outputs[0])
        emitter.graph.insert_after(last, [kept])
    emitter.flush()


def _hangs_on_integers(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _MOVING and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _leads_to_integers(value: ir.Value) -> bool:
    """Whether onnxruntime may move the QuantizeLinear of what is made of a value up to the value itself."""
    readers = value.consumers()
    if any(reader.op_type == "QuantizeLinear" for reader in readers):
        return True
    return any(_leads_to_integers(reader.outputs[0]) for reader in readers if reader.op_type in _MOVING | {"Relu", "Clip"})


def _round(emitter: Emitter, entry: RoundedValue, constants: list[ir.Value]) -> None:
    value = entry.value
    before = value if entry.limits is None else entry.limits.inputs[0]
    if before is None:
        return
    levels = make_node("QuantizeLinear", [before, *constants], emitter.unique(f"{value.name}.quantized"))
    restored = make_node("DequantizeLinear", [levels.outputs[0], *constants], emitter.unique(f"{value.name}.restored"))
    output = restored.outputs[0]
    describe_like(output, value)
    readers = value.consumers() if entry.readers is None else entry.readers
    for reader, index in [use for use in value.uses() if use[0] in readers and use[0] is not levels]:
        reader.replace_input_with(index, output)
    graph, producer = emitter.graph, before.producer()
    if producer is None:
        graph.insert_before(graph[0], [levels, restored])
    else:
        graph.insert_after(producer, [levels, restored])
    if entry.readers is None and value.is_graph_output():
        value.name, output.name = f"{value.name}.exact", value.name
        value.replace_all_uses_with(output, replace_graph_outputs=True)
        if entry.limits is None:
            levels.replace_input_with(0, value)
    if entry.limits is not None and entry.limits.graph is not None:
        entry.limits.graph.remove(entry.limits, safe=True)
