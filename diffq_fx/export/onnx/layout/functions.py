"""One node per weight: whatever makes a weight of its integers becomes one call of a function that the file brings along.

What onnxruntime does not read in one standard operator is a chain of nodes (Cast, Sub, Mul, Concat, Gather ...). The chain is put into a
model-local function: ``diffq_fx::DequantizeLinear`` gives the float weight, ``DequantizeRows`` picked rows of it, and
``DynamicQuantizeMatMul`` its product with activations that are rounded at every run. Chains that differ get names with a number behind
them. onnxruntime (1.31) inlines functions when it loads the file, before it folds and fuses, so that the same kernels run. Runtimes
without model-local functions (OpenVINO 2026.4) read layout "qdq", or the file after ``onnx.inliner.inline_local_functions``.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from diffq_fx.export.onnx.layout.emitter import describe_like

FUNCTION_DOMAIN = "diffq_fx"
Name = Literal["DequantizeLinear", "DequantizeRows", "DynamicQuantizeMatMul"]
_DOCUMENTATION: Mapping[Name, str] = {
    "DequantizeLinear": "The float weight of the integers that the file holds: (levels - zero_point) * scale, or a codebook's entries.",
    "DequantizeRows": "Some rows of a weight in float: (levels[indices] - zero_point) * scale.",
    "DynamicQuantizeMatMul": "activation @ ((levels - zero_point) * scale), the activation rounded to uint8 by its own range.",
}
_LABELS: Mapping[Name, str] = {"DequantizeLinear": "dequantized", "DequantizeRows": "rows", "DynamicQuantizeMatMul": "product"}
"""What a node that calls a function is called, behind the name of its weight."""
_MARK = "diffq_fx.weight"
_ORDER = ("levels", "codes", "part", "factor", "codebook", "scale", "zero_point")
"""Inputs of a function by their first words, behind those that are computed; others come last."""


def mark_weight(value: ir.Value, weight: str, function: Name = "DequantizeLinear", **given: tuple[ir.Node, int]) -> None:
    """Note that one node shall give out a value; ``given`` is what the graph computes for it: its name -> a node and which input of it."""
    value.meta[_MARK] = weight, function, given


def call_functions(model: ir.Model) -> None:
    """Replace what makes each marked value by a call, but for one standard DequantizeLinear; the model is at its final opset."""
    bodies: dict[tuple[str, bytes], str] = {}
    count: Counter[str] = Counter()
    for value in [value for node in model.graph for value in node.outputs if _MARK in value.meta]:
        weight, function, places = value.meta[_MARK]
        given: dict[str, ir.Value] = {name: node.inputs[index] for name, (node, index) in places.items()}
        nodes = list(dict.fromkeys(_producers(value, set(given.values()))))
        name = f"{weight}.{_LABELS[function]}"
        count[name] += 1
        if [node.op_type for node in nodes] == ["DequantizeLinear"]:
            continue
        inputs = {**given, **_initializers(nodes, set(given.values()), weight)}
        body = _body(nodes, value, inputs, function, model.opset_imports[""])
        key = function, ir.serde.serialize_function(body).SerializeToString(deterministic=True)
        if key not in bodies:
            count[function] += 1
            bodies[key] = body.name = function if count[function] == 1 else f"{function}{count[function]}"
            model.functions[body.identifier()] = body
        _call(model.graph, bodies[key], list(inputs.values()), value, name if count[name] == 1 else f"{name}_{count[name]}")
    if bodies:
        model.opset_imports[FUNCTION_DOMAIN] = 1
        RemoveUnusedNodesPass()(model)


def _producers(value: ir.Value, given: set[ir.Value]) -> Iterator[ir.Node]:
    """The nodes that a value hangs on, in the order of computation; some of them twice."""
    node = value.producer()
    if node is not None and value not in given:
        for source in node.inputs:
            if source is not None:
                yield from _producers(source, given)
        yield node


def _is_baked(value: ir.Value) -> bool:
    """Whether an initializer belongs into the function: shapes, bounds, offsets and factors, not the numbers of a weight."""
    tensor = value.const_value
    one_number = (ir.DataType.INT16, ir.DataType.INT32)
    return tensor is not None and (tensor.dtype == ir.DataType.INT64 or (tensor.dtype in one_number and tensor.size == 1))


def _initializers(nodes: list[ir.Node], given: set[ir.Value], weight: str) -> dict[str, ir.Value]:
    """Name inside of the function -> initializer."""
    used = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None and value.const_value is not None)
    own = [value for value in used if value not in given and not _is_baked(value)]
    named = {str(value.name).removeprefix(f"{weight}.").replace(".", "_"): value for value in own}
    places = {name: next((i for i, word in enumerate(_ORDER) if name.startswith(word)), len(_ORDER)) for name in named}
    return {name: named[name] for name in sorted(named, key=lambda name: places[name])}


def _body(nodes: list[ir.Node], result: ir.Value, inputs: dict[str, ir.Value], function: Name, opset: int) -> ir.Function:
    """A function of copies of some nodes; its names depend on the nodes alone, so that equal ones are equal byte by byte."""
    copies = {value: ir.Value(name=name) for name, value in inputs.items()}
    formal, copied = list(copies.values()), []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in copies and value.const_value is not None:  # a shape, a bound or an offset
                constant = ir.node("Constant", [], {"value": ir.Tensor(value.const_value.numpy())})
                copies[value] = constant.outputs[0]
                copied.append(constant)
        copy = ir.node(
            node.op_type,
            [None if value is None else copies[value] for value in node.inputs],
            node.attributes,
            num_outputs=len(node.outputs),
        )
        copies.update(zip(node.outputs, copy.outputs, strict=True))
        copied.append(copy)
    for place, node in enumerate(copied):
        node.name = ""  # in its place the results have one that says what they are, constants a short one
        for number, value in enumerate(node.outputs):
            value.name = f"{node.op_type if node.inputs else 'c'}{place}{f'_{number}' if number else ''}"
    copies[result].name = "product" if function == "DynamicQuantizeMatMul" else "weight"
    graph = ir.Graph(formal, [copies[result]], nodes=copied, opset_imports={"": opset}, doc_string=_DOCUMENTATION[function])
    return ir.Function(FUNCTION_DOMAIN, function, graph=graph, attributes=[])


def _call(graph: ir.Graph, function: str, inputs: list[ir.Value], old: ir.Value, name: str) -> None:
    node = ir.node(function, inputs, domain=FUNCTION_DOMAIN, name=name)
    new, producer = node.outputs[0], old.producer()
    describe_like(new, old)
    new.name, old.name = old.name, f"{name}.inlined"
    if producer is not None:
        graph.insert_before(producer, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
