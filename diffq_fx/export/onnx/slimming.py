"""Leaves out of a file what every reader finds again by itself: shapes that can be derived, long names of what is gone after loading.

In a file of 2 to 8 bits a weight this is up to a twentieth of the whole.
"""

from itertools import count

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_KEPT_NAMES = ("DequantizeLinear",)
"""A profile of onnxruntime names these: that is how the export knows which weight is dequantized at every run."""


def drop_what_is_derived(model: ir.Model) -> None:
    """Remove what onnx's shape inference finds again, and shorten names, in place; the model is complete, at its final opset."""
    _shorten_constants(model.graph)
    bare = model.clone()
    for value in _inner_values(bare.graph):
        value.shape, value.type = None, None
    # Without data_prop: onnxruntime does not know the sizes that it finds.
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(bare)
    found = {value.name: value for value in _inner_values(bare.graph)}
    for value in _inner_values(model.graph):
        if _says_as_much(found[value.name], value):
            value.shape, value.type = None, None
    for value in model.graph.initializers.values():
        if not value.is_graph_output():
            value.shape, value.type = None, None  # its tensor has both


def _inner_values(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs if not value.is_graph_output()]


def _says_as_much(found: ir.Value, known: ir.Value) -> bool:
    """Whether all sizes were found, the names of symbolic ones too: onnxruntime fuses some nodes only where two sizes agree."""
    if known.type is not None and found.type != known.type:
        return False
    return known.shape is None or (found.shape is not None and list(found.shape) == list(known.shape))


def _shorten_constants(graph: ir.Graph) -> None:
    """Nodes that onnxruntime computes when it loads the file need no name, their results a short one."""
    constants: set[ir.Value | None] = {None, *graph.initializers.values()}
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    taken |= {value.name for node in graph.all_nodes() for value in node.outputs}
    names = (name for number in count() if (name := f"c{number}") not in taken)
    for node in graph:
        has_bodies = any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values())
        if not node.inputs or not constants.issuperset(node.inputs) or has_bodies:
            continue
        constants.update(node.outputs)
        if node.op_type not in _KEPT_NAMES:
            node.name = ""
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = next(names)
