"""What an ONNX model takes and gives: names, types and shapes, inputs that are made for it, and whether two models agree."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import ModelProto
from onnx_ir.passes.common import InlinePass, ShapeInferencePass
from onnxruntime import InferenceSession

from diffq_fx.errors import DiffQError


@dataclass(frozen=True, kw_only=True)
class TensorSignature:
    """One input or output of a model."""

    name: str
    type: str
    """As onnxruntime calls it: "tensor(float)"."""
    shape: tuple[int | str | None, ...]
    """A size, the name of an open one, or None for an open one without a name."""

    def __str__(self) -> str:
        """Name, type and shape for messages."""
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"'{self.name}' {self.type} [{sizes}]"

    def keys(self, position: int) -> list[str]:
        """What an open dimension may be called, its own name first; none for a fixed one."""
        size = self.shape[position]
        return [] if isinstance(size, int) else [*([size] if size else []), f"{self.name}.{position}"]


DEFAULT_BOUND = 2
"""Integers whose range the graph does not tell are drawn from 0 to this, exclusive."""

_DRAWN = "float float16 double bool int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()
_NUMPY_TYPES = {f"tensor({name})": ir.DataType[name.upper()].numpy() for name in _DRAWN}

_ID_VIEWS = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Slice", "Expand"))

_Pair = tuple[TensorSignature | None, TensorSignature | None]


def resolve_shapes(signature: Sequence[TensorSignature], batch: int, dims: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Choose a size for every open dimension; gives the shape of each input by its name.

    ``batch`` is for open first dimensions and every other one of the same name; ``dims``, by the dimension's name or
    ``"input.position"``, come before it.

    Raises:
        ValueError: A size is missing, is not positive, names no open dimension, or no input can take ``batch``.

    Example:
        >>> ids = TensorSignature(name="ids", type="tensor(int64)", shape=("batch", "length"))
        >>> resolve_shapes([ids], batch=2, dims={"length": 16})
        {'ids': (2, 16)}
    """
    sizes = dict(dims or {})
    _check_sizes(signature, batch, sizes)
    for entry in signature:
        if entry.shape and isinstance(entry.shape[0], str):
            sizes.setdefault(entry.shape[0], batch)
    return {entry.name: _resolve(entry, batch, sizes) for entry in signature}


def _resolve(entry: TensorSignature, batch: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape: list[int] = []
    for position, size in enumerate(entry.shape):
        given = [sizes[key] for key in entry.keys(position) if key in sizes]
        if not isinstance(size, int) and not given and position:
            key = entry.keys(position)[0]
            raise ValueError(
                f"input {entry} leaves dimension {position} open and only the first one is the batch. "
                f"Give it a size: dims={{{key!r}: 128}}, or --dim {key}=128 on the command line."
            )
        shape.append(size if isinstance(size, int) else given[-1] if given else batch)
    return tuple(shape)


def _check_sizes(signature: Sequence[TensorSignature], batch: int, sizes: Mapping[str, int]) -> None:
    known = [key for entry in signature for position in range(len(entry.shape)) for key in entry.keys(position)]
    if wrong := sorted(set(sizes) - set(known)):
        open_ones = ", ".join(dict.fromkeys(known)) or "none"
        raise ValueError(f"dims names {', '.join(wrong)}, which no input leaves open; open dimensions: {open_ones}.")
    for name, size in {"batch": batch, **sizes}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    firsts = [entry.shape[0] for entry in signature if entry.shape]
    if batch != 1 and batch not in firsts and all(isinstance(size, int) for size in firsts):
        raise ValueError(f"batch={batch}, but the first dimension of every input is fixed at {firsts}. Leave batch at 1.")


def make_inputs(
    signature: Sequence[TensorSignature], shapes: Mapping[str, tuple[int, ...]], bounds: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
    """Draw random inputs: normal floats, fair booleans, all values of 8-bit integers, or integers in ``[0, bound)``.

    Integers are mostly ids that select rows of a table, so they are drawn below the smallest table that they select from; where none is
    found they are drawn from {0, 1}, which a mask and any table can take. ``shapes`` and ``bounds`` (see :func:`index_bounds`) are by the
    input's name.

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
    dtype = _NUMPY_TYPES[entry.type]
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


def signature_of(entries: Sequence[Any]) -> list[TensorSignature]:
    """The signature that ``session.get_inputs()`` or ``session.get_outputs()`` gives."""
    shapes = [tuple(None if size == "" else size for size in entry.shape) for entry in entries]
    return [TensorSignature(name=entry.name, type=entry.type, shape=shape) for entry, shape in zip(entries, shapes, strict=True)]


def pair_signatures(
    sessions: Sequence[InferenceSession], paths: Sequence[str | Path], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Pair the inputs of two models A and B, and their outputs: by name, and the rest, which have other names, in their order.

    ``shapes`` are those of the inputs that were made for A. Gives what each input of A is called in B, and each output.

    Raises:
        DiffQError: An input or output has none to pair with, or one of another type, rank or fixed size.
    """
    a, b = sessions
    inputs = _pairs([replace(entry, shape=shapes[entry.name]) for entry in signature_of(a.get_inputs())], signature_of(b.get_inputs()))
    outputs = _pairs(signature_of(a.get_outputs()), signature_of(b.get_outputs()))
    if findings := [*_mismatches("input", inputs), *_mismatches("output", outputs)]:
        raise DiffQError(f"A '{paths[0]}' and B '{paths[1]}' cannot be compared: {'; '.join(findings)}. Export both from the same model.")
    names_of_inputs, names_of_outputs = ({x.name: y.name for x, y in pairs if x and y} for pairs in (inputs, outputs))
    return names_of_inputs, names_of_outputs


def _pairs(in_a: Sequence[TensorSignature], in_b: Sequence[TensorSignature]) -> list[_Pair]:
    names_a, by_name = {entry.name for entry in in_a}, {entry.name: entry for entry in in_b}
    others = iter([entry for entry in in_b if entry.name not in names_a])
    pairs: list[_Pair] = [(entry, by_name.get(entry.name) or next(others, None)) for entry in in_a]
    return [*pairs, *((None, entry) for entry in others)]


def _mismatches(kind: str, pairs: Sequence[_Pair]) -> list[str]:
    return [
        f"{kind} {x} of A does not fit {y} of B" if x and y else f"{kind} {x or y} is in {'A' if x else 'B'} alone"
        for x, y in pairs
        if x is None or y is None or x.type != y.type or not (_fits(x.shape, y.shape) or (kind == "output" and x.name == y.name))
    ]  # onnxruntime calls the shape [] where it does not know the rank; outputs of one name are compared as they come


def _fits(shape: tuple[int | str | None, ...], other: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(other) and all(
        size == wanted or not (isinstance(size, int) and isinstance(wanted, int)) for size, wanted in zip(shape, other, strict=True)
    )
