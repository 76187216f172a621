"""Random inputs made from the signature of an ONNX model, such that the model can run on them.

Sizes that the file leaves open come from the caller. Integer inputs are mostly ids that select rows of a table, so
they are drawn below the smallest table that they select from; where none is found they are drawn from {0, 1}, which a
mask and any table can take.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx import ModelProto
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from diffq_fx.errors import DiffQError
from diffq_fx.export.onnx.signatures import TensorSignature

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


def make_inputs(
    signature: Sequence[TensorSignature], shapes: Mapping[str, tuple[int, ...]], bounds: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
    """Draw random inputs: normal floats, fair booleans, all values of 8-bit integers, or integers in ``[0, bound)``.

    ``shapes`` and ``bounds`` (see :func:`index_bounds`) are by the input's name.

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


def index_bounds(models: Iterable[ModelProto]) -> dict[str, int]:
    """The integer inputs that select along an axis of known size -> the smallest such size, over models of the same inputs."""
    bounds: dict[str, int] = {}
    for proto in models:
        model = ir.from_proto(proto)
        InlinePass()(model)
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
        for node in model.graph.all_nodes():
            if node.op_type not in ("Gather", "GatherBlockQuantized") or node.inputs[0] is None:
                continue
            axis = node.attributes.get_int("axis" if node.op_type == "Gather" else "gather_axis", 0)
            shape, source = node.inputs[0].shape or (), node.inputs[1]
            size = shape[axis] if -len(shape) <= axis < len(shape) else None
            while source is not None and (producer := source.producer()) is not None and producer.op_type in _ID_VIEWS:
                source = producer.inputs[0]
            if isinstance(size, int) and source is not None and source.is_graph_input():
                bounds[str(source.name)] = min(bounds.get(str(source.name), size), size)
    return bounds
