"""Random inputs made from the signature of an ONNX model, such that the model can run on them.

Sizes that the file leaves open come from the caller. Integer inputs are mostly ids that select rows of a table, so
they are drawn below the smallest table that they select from; where none is found they are drawn from {0, 1}, which a
mask and any table can take.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffq_fx.errors import DiffQError
from diffq_fx.export.onnx.signatures import TensorSignature

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

DEFAULT_BOUND = 2
"""Integers whose range the graph does not tell are drawn from 0 to this, exclusive."""

_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({kind})": kind for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")},
}

_ID_VIEWS = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Slice", "Expand"))
_SAME_SHAPE = frozenset(("DequantizeLinear", "Cast", "Identity", "Sub", "Mul"))


def make_inputs(
    signature: Sequence[TensorSignature], shapes: Mapping[str, tuple[int, ...]], bounds: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
    """Draw random inputs: normal floats, fair booleans, all values of 8-bit integers, or integers in ``[0, bound)``.

    Args:
        signature: the inputs of a model.
        shapes: input name -> shape.
        bounds: input name -> exclusive upper bound of its integers, see :func:`index_bounds`.
        seed: of the random numbers; the same seed draws the same inputs.

    Raises:
        DiffQError: An input is of a type that cannot be drawn (text, sequence, map).

    Example:
        >>> ids = TensorSignature(name="ids", type="tensor(int64)", shape=(4,))
        >>> make_inputs([ids], {"ids": (4,)}, {"ids": 1000}, seed=0)["ids"].tolist()
        [850, 636, 511, 269]
    """
    generator = np.random.default_rng(seed)
    return {entry.name: _draw(entry, shapes[entry.name], bounds.get(entry.name), generator) for entry in signature}


def _draw(entry: TensorSignature, shape: tuple[int, ...], bound: int | None, generator: np.random.Generator) -> np.ndarray:
    if entry.type not in _NUMPY_TYPES:
        raise DiffQError(f"cannot draw random values for input {entry}: only tensors of numbers and booleans can be drawn.")
    dtype = np.dtype(_NUMPY_TYPES[entry.type])
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    if bound is None and dtype.itemsize == 1:
        limits = np.iinfo(dtype)
        return generator.integers(limits.min, limits.max + 1, shape).astype(dtype)
    largest = int(np.iinfo(dtype).max) + 1
    return generator.integers(0, min(bound or DEFAULT_BOUND, largest), shape).astype(dtype)


def index_bounds(models: "Iterable[ModelProto]") -> dict[str, int]:
    """The integer inputs that select rows of a table -> the number of rows of the smallest one, over models of the same inputs."""
    from onnx.inliner import inline_local_functions

    bounds: dict[str, int] = {}
    for model in models:
        model = inline_local_functions(model) if model.functions else model
        inputs = {entry.name: frozenset((entry.name,)) for entry in model.graph.input}
        _visit_graph(model.graph, inputs, {}, bounds)
    return bounds


_Sources = dict[str, frozenset[str]]  # value -> the inputs that it holds unchanged
_Tables = dict[str, tuple[int, ...]]  # value -> shape, for those made of constants


def _visit_graph(graph: "GraphProto", sources: _Sources, tables: _Tables, bounds: dict[str, int]) -> None:
    tables.update({tensor.name: tuple(tensor.dims) for tensor in graph.initializer})
    for node in graph.node:
        attributes: dict[str, Any] = {attribute.name: attribute for attribute in node.attribute}
        for attribute in attributes.values():
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                _visit_graph(inner, dict(sources), dict(tables), bounds)
        if node.op_type == "Constant" and "value" in attributes:
            tables[node.output[0]] = tuple(attributes["value"].t.dims)
        elif node.op_type in ("Gather", "GatherBlockQuantized"):
            axis = attributes["axis" if node.op_type == "Gather" else "gather_axis"].i if attributes else 0
            shape = tables.get(node.input[0], ())
            for name in sources.get(node.input[1], ()) if -len(shape) <= axis < len(shape) else ():
                bounds[name] = min(bounds.get(name, shape[axis]), shape[axis])
        if node.op_type in _ID_VIEWS and node.input[0] in sources:
            sources[node.output[0]] = sources[node.input[0]]
        _follow_table(node, attributes, tables)


def _follow_table(node: "NodeProto", attributes: dict[str, Any], tables: _Tables) -> None:
    """Note the shape of a table behind operators that keep or permute it."""
    shapes = [tables[name] for name in node.input if name in tables]
    if not shapes or node.input[0] not in tables:
        return
    if node.op_type in _SAME_SHAPE and (node.op_type not in ("Sub", "Mul") or len(shapes) == 2):
        tables[node.output[0]] = max(shapes, key=lambda shape: (len(shape), shape))
    elif node.op_type == "Transpose":
        order = attributes["perm"].ints if "perm" in attributes else reversed(range(len(shapes[0])))
        tables[node.output[0]] = tuple(shapes[0][place] for place in order)
