"""One node per weight: whatever makes a float weight of its integers becomes one call of a function that the file brings along.

A weight that onnxruntime does not fuse in its standard form hangs on a chain of nodes (Cast, Sub, Mul, Concat, Gather ...). The chain is
put into a model-local function ``diffq_fx::DequantizeLinear``; chains that differ get ``DequantizeLinear2`` and so on. onnxruntime (1.31)
inlines it when it loads the file, before it folds and fuses, so that the same kernels run. Runtimes without model-local functions
(OpenVINO 2026.4) read layout "qdq", or the file after ``onnx.inliner.inline_local_functions``.
"""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from diffq_fx.export.onnx.layout.emitter import describe_like

FUNCTION_DOMAIN = "diffq_fx"
_NAME = "DequantizeLinear"
_WEIGHT = "diffq_fx.weight"
_DOCUMENTATION = "The float weight of the integers that the file holds: (levels - zero_point) * scale, or a codebook's entries."
_ORDER = ("levels", "codes", "part", "codebook", "scale", "zero_point")
"""Inputs of a function by their first words; others come last."""


def mark_weight(value: ir.Value, name: str) -> None:
    """Note that a value is a whole weight in float.

    Args:
        value: hangs on initializers alone.
        name: of the weight.
    """
    value.meta[_WEIGHT] = name


def call_functions(model: ir.Model) -> None:
    """Replace the nodes that make each marked weight by the call of a function; one standard DequantizeLinear stays as it is.

    Args:
        model: at its final opset; changed in place.
    """
    marked = [value for node in model.graph for value in node.outputs if _WEIGHT in value.meta]
    bodies: dict[bytes, str] = {}
    names: set[str | None] = set()
    for value in marked:
        nodes = list(dict.fromkeys(_producers(value)))
        if [node.op_type for node in nodes] == [_NAME]:
            names.add(nodes[0].name)
            continue
        weight = value.meta[_WEIGHT]
        inputs = _inputs(nodes, weight)
        body = _body(nodes, value, inputs, model.opset_imports[""])
        key = ir.serde.serialize_function(body).SerializeToString(deterministic=True)
        if key not in bodies:
            bodies[key] = _NAME if not bodies else f"{_NAME}{len(bodies) + 1}"
            body.name = bodies[key]
            model.functions[body.identifier()] = body
        _call(model.graph, bodies[key], list(inputs.values()), value, _unique(f"{weight}.dequantized", names))
    if bodies:
        model.opset_imports[FUNCTION_DOMAIN] = 1
        RemoveUnusedNodesPass()(model)


def _producers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that a value hangs on, in the order of computation; some of them twice."""
    node = value.producer()
    if node is not None:
        for source in node.inputs:
            if source is not None:
                yield from _producers(source)
        yield node


def _unique(name: str, taken: set[str | None]) -> str:
    """``name``, or with a number behind it where a weight has several nodes."""
    found = next(each for each in (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))) if each not in taken)
    taken.add(found)
    return found


def _is_baked(value: ir.Value) -> bool:
    """Whether an initializer belongs into the function: shapes, bounds and offsets, not the numbers of a weight."""
    tensor = value.const_value
    return tensor is not None and (tensor.dtype == ir.DataType.INT64 or (tensor.dtype == ir.DataType.INT16 and tensor.size == 1))


def _inputs(nodes: list[ir.Node], weight: str) -> dict[str, ir.Value]:
    """Name inside of the function -> initializer."""
    initializers = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None and value.producer() is None)
    named = {str(value.name).removeprefix(f"{weight}.").replace(".", "_"): value for value in initializers if not _is_baked(value)}
    places = {name: next((i for i, word in enumerate(_ORDER) if name.startswith(word)), len(_ORDER)) for name in named}
    return {name: named[name] for name in sorted(named, key=lambda name: places[name])}


def _body(nodes: list[ir.Node], result: ir.Value, inputs: dict[str, ir.Value], opset: int) -> ir.Function:
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
    for place, value in enumerate(value for node in copied for value in node.outputs):
        value.name = f"v{place}"
    copies[result].name = "weight"
    graph = ir.Graph(formal, [copies[result]], nodes=copied, opset_imports={"": opset}, doc_string=_DOCUMENTATION)
    return ir.Function(FUNCTION_DOMAIN, _NAME, graph=graph, attributes=[])


def _call(graph: ir.Graph, function: str, inputs: list[ir.Value], old: ir.Value, name: str) -> None:
    node = ir.node(function, inputs, domain=FUNCTION_DOMAIN, name=name)
    new, producer = node.outputs[0], old.producer()
    describe_like(new, old)
    new.name, old.name = old.name, f"{name}.inlined"
    if producer is not None:
        graph.insert_before(producer, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
