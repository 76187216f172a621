"""Which activations become uint8 around integer convolutions, and the pairs that round them.

Each value that an integer kernel reads or gives is rounded by ``QuantizeLinear -> DequantizeLinear``; onnxruntime fuses every kernel with
the pairs around it. The values are: what a convolution reads, what it gives, and whatever Add, Mul, Concat, Sigmoid, LeakyRelu or
pooling make of such values alone. A Relu or Clip behind one of them is the limit of the integers, and leaves the graph.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import Emitter, constant_of, describe_like, make_node, only_reader, take_place
from diffq_fx.export.onnx.layout.request import Range

MOVING = frozenset(("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"))
"""What gives out numbers that it has read: the same scale before and behind."""
_PASSING = MOVING | {"Identity", "Slice"}
"""What onnxruntime moves a DequantizeLinear behind, and a QuantizeLinear in front of."""
_COMPUTING = ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What onnxruntime makes an integer product of between a DequantizeLinear and a QuantizeLinear."""
_REDUCTIONS = (("ReduceMin", "min"), ("ReduceMax", "max"))
_LEVELS = 255


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


def find_rounded(graph: ir.Graph, convolutions: Set[ir.Node]) -> list[RoundedValue]:
    """Find the values to round around the ``convolutions`` that shall be integer ones, in the order of the graph."""
    found: dict[ir.Value, RoundedValue] = {}
    integer_nodes: set[ir.Node | None] = set(convolutions)
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node in convolutions:
            found.setdefault(inputs[0], RoundedValue(inputs[0], None, (), inputs[0]))
        elif node.domain or not inputs or not _reads_integers(node, inputs, found):
            continue
        integer_nodes.add(node)
        if node.op_type in MOVING:
            output = node.outputs[0]
            found[output] = RoundedValue(output, None, None, found[inputs[0]].source)
        else:
            limits = _limits(node)
            output = limits.outputs[0] if limits is not None else node.outputs[0]
            found[output] = RoundedValue(output, limits, None, output)
    needed = []
    for rounded in reversed(found.values()):
        readers = [reader for reader in rounded.value.consumers() if reader in integer_nodes]
        if rounded.source is not rounded.value and not readers:  # integers that are only moved are of no use to float readers
            integer_nodes -= {rounded.value.producer()}
        else:  # what no integer kernel has made is rounded for integer kernels alone
            needed.append(rounded if rounded.readers is None else replace(rounded, readers=tuple(readers)))
    return needed[::-1]


def _reads_integers(node: ir.Node, inputs: Sequence[ir.Value], found: Mapping[ir.Value, RoundedValue]) -> bool:
    if node.op_type in MOVING:
        return inputs[0] in found and len(node.outputs) == 1
    return node.op_type in _COMPUTING and all(value in found for value in inputs)


def _limits(node: ir.Node) -> ir.Node | None:
    """The Relu, or Clip to constant limits around 0, that alone reads a node."""
    reader = only_reader(node.outputs[0])
    if reader is None or reader.op_type == "Relu":
        return reader
    if reader.op_type != "Clip":
        return None
    given = [(value, constant_of(value)) for value in [*reader.inputs[1:], None, None][:2]]
    if any(value is not None and number is None for value, number in given):
        return None
    low, high = (0.0 if number is None else float(number) for _, number in given)
    return reader if low <= 0.0 <= high else None


def watch(model: ir.Model, rounded: Sequence[RoundedValue]) -> dict[str, tuple[str, str]]:
    """Let a graph give out the range of each value with one of its own: name of the value -> names of the outputs (least, largest)."""
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
    """Put QuantizeLinear and DequantizeLinear behind each value; ``ranges`` has those of the values with one of their own."""
    grids: dict[ir.Value, list[ir.Value]] = {}
    for source in dict.fromkeys(entry.source for entry in rounded):
        scale, zero_point = grid(ranges[str(source.name)])
        grids[source] = [emitter.initializer(f"{source.name}.scale", scale), emitter.initializer(f"{source.name}.zero_point", zero_point)]
    for entry in rounded:
        _round(emitter, entry, grids[entry.source])


def keep_in_float(emitter: Emitter, convolutions: Set[ir.Node]) -> None:
    """Put a Max between integers and each product that onnxruntime (1.31) would wrongly make an integer one.

    Behind products whose weight stays in float: between a DequantizeLinear and a QuantizeLinear onnxruntime gives such a weight int8 levels
    of its own when it loads the file, one scale for all of it, up to 127. They saturate on x86 without VNNI, and are less exact everywhere.
    In front of products whose weight has a scale for each block: the kernel for two DequantizeLinear takes no such scales, and fails.
    In front of products of two activations: no levels in the file prove that they are exact.
    """
    kept: list[tuple[ir.Value, ir.Node, bool]] = []
    for node in emitter.graph:
        if node.op_type not in PRODUCTS or node.domain or node in convolutions or dequantize_of(node.inputs[0]) is None:
            continue
        weight = dequantize_of(node.inputs[1])
        if node.inputs[0] is not None and weight is not None and (weight.attributes.get_int("block_size", 0) or _is_activation(weight)):
            kept.append((node.inputs[0], node, True))
            continue
        last = with_bias(node)
        if leads_to_integers(last.outputs[0]):
            kept.append((last.outputs[0], last, False))
    lowest = emitter.initializer("lowest", np.finfo(np.float32).min) if kept else None
    for value, node, in_front in kept:
        new = make_node("Max", [value, lowest], emitter.unique(f"{value.name}.float"))
        describe_like(new.outputs[0], value)
        _redirect(value, new.outputs[0], [node] if in_front else [reader for reader in value.consumers() if reader is not new])
        (emitter.graph.insert_before if in_front else emitter.graph.insert_after)(node, [new])


def dequantize_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value is made by, or was moved from."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _PASSING and not node.domain and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" and not node.domain else None


def with_bias(product: ir.Node) -> ir.Node:
    """The Add that alone reads a product, else the product itself: onnxruntime makes a Gemm of MatMul and Add."""
    reader = only_reader(product.outputs[0])
    return reader if reader is not None and reader.op_type == "Add" else product


def _is_activation(dequantize: ir.Node) -> bool:
    levels = dequantize.inputs[0]
    producer = None if levels is None else levels.producer()
    return producer is not None and producer.op_type == "QuantizeLinear"


def leads_to_integers(value: ir.Value) -> bool:
    """Whether onnxruntime may move the QuantizeLinear of what is made of a value up to the value itself."""
    readers = value.consumers()
    if any(reader.op_type == "QuantizeLinear" for reader in readers):
        return True
    return any(leads_to_integers(reader.outputs[0]) for reader in readers if reader.op_type in _PASSING | {"Relu", "Clip"})


def _round(emitter: Emitter, entry: RoundedValue, constants: Sequence[ir.Value]) -> None:
    value, graph = entry.value, emitter.graph
    before = value if entry.limits is None else entry.limits.inputs[0]
    if before is None:
        return
    levels = make_node("QuantizeLinear", [before, *constants], emitter.unique(f"{value.name}.quantized"))
    restored = make_node("DequantizeLinear", [levels.outputs[0], *constants], emitter.unique(f"{value.name}.restored"))
    output = restored.outputs[0]
    describe_like(output, value)
    readers = value.consumers() if entry.readers is None else entry.readers
    _redirect(value, output, [reader for reader in readers if reader is not levels])
    producer = before.producer()
    if producer is None:
        graph.insert_before(graph[0], [levels, restored])
    else:
        graph.insert_after(producer, [levels, restored])
    if entry.readers is None and value.is_graph_output():
        take_place(output, value, "exact")
        if entry.limits is None:
            levels.replace_input_with(0, value)
    if entry.limits is not None:
        graph.remove(entry.limits, safe=True)


def _redirect(old: ir.Value, new: ir.Value, readers: Sequence[ir.Node]) -> None:
    for reader, index in [use for use in old.uses() if use[0] in readers]:
        reader.replace_input_with(index, new)
