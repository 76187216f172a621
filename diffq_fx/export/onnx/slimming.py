"""Makes a file smaller by what every reader undoes: smaller types that are cast back, shapes that can be derived, long names.

Parameters that are not quantized become float16, tables of integers what they need. Shapes and names of what is gone after loading are, in
a file of 2 to 8 bits a weight, up to a twentieth of the whole.
"""

from collections.abc import Set
from itertools import count

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor, nn

from diffq_fx.convert import CompressionRecord
from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.parts import CHILD, parts_of
from diffq_fx.storage.packing import narrowed

_MIN_VALUES = 64
"""A tensor with fewer values would grow by its Cast node."""
_KEPT_NAMES = ("DequantizeLinear",)
"""A profile of onnxruntime names these: that is how the export knows which weight is dequantized at every run."""


def halved_names(converted: nn.Module) -> set[str]:
    """Names of the float32 parameters to be stored as float16, where that holds them; buffers need the range of float32."""
    parts = {path: vars(part)[CHILD].method.rest_dtype == "float16" for path, part in parts_of(converted, CompressionRecord).items()}
    if getattr(converted, "rest_dtype", None) is torch.float16:
        parts[""] = True
    prefixes = tuple(f"{path}." if path else "" for path, halves in parts.items() if halves)
    return {
        name
        for name, parameter in converted.named_parameters(remove_duplicate=False)
        if name.startswith(prefixes)
        and parameter.dtype == torch.float32
        and parameter.numel() >= _MIN_VALUES
        and bool(parameter.half().isfinite().all())
    }


def store_narrow(model: ir.Model, halved: Set[str]) -> None:
    """Replace initializers by ones of a smaller type and a Cast, in place: float32 ones that are to be ``halved``, and large int64 tables.

    Names that the graph does not have are ignored. Tables of integers are those of relative positions, above all.
    """
    emitter, known = Emitter(model.graph), model.graph.initializers
    for value in [known[name] for name in sorted(halved & known.keys())]:
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            _store_as(emitter, value, value.const_value.numpy().astype(np.float16), value.dtype)
    emitter.flush()
    for value in list(known.values()):
        if value.dtype == ir.DataType.INT64 and value.const_value is not None:
            table = torch.from_numpy(np.array(value.const_value.numpy()))
            small = narrowed(table)
            if small.dtype != table.dtype:
                _store_as(emitter, value, small.numpy(), value.dtype)
    emitter.flush()


def _store_as(emitter: Emitter, value: ir.Value, stored: np.ndarray, dtype: ir.DataType) -> None:
    name, is_output = str(value.name), value.is_graph_output()
    cast = emitter.cast(emitter.initializer(f"{name}.{stored.dtype}", stored), dtype)
    cast.shape = value.shape
    value.replace_all_uses_with(cast, replace_graph_outputs=True)
    del emitter.graph.initializers[name]
    if is_output:
        cast.name = name


class HalvedModel(nn.Module):
    """A model that computes with some parameters rounded to float16, as its file will; the model itself is not touched."""

    def __init__(self, model: nn.Module, names: Set[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the model with the rounded parameters."""
        rounded: dict[str, Tensor] = {name: p.half().float() for name, p in self.model.named_parameters() if name in self.names}
        return torch.func.functional_call(self.model, rounded, args, kwargs)


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
