"""Who reads the constant tensors of an ONNX graph, and which of them are the scales and zero points of which.

One walk over the nodes in the order of the file carries every constant (initializer or Constant node, of the graph, of
the graphs inside its nodes and of its functions) through the operators that only move or dequantize values, up to the
operator that computes with it. The path of operators is part of the answer: it decides whether onnxruntime fuses.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx_ir import DataType

from diffq_fx.export.onnx.files import external_region

_VIEWS = frozenset("Identity Cast Transpose Reshape Squeeze Unsqueeze Flatten Slice Split Expand Gather Round TopK".split())
"""Operators that move, sort or round the values of their first input and compute nothing with others."""

_Positions = tuple[int | None, int | None, int]

_QUANTIZED_INPUTS: dict[str, tuple[_Positions, ...]] = {
    "DequantizeLinear": ((0, 1, 2),),
    "QuantizeLinear": ((None, 1, 2),),
    "QLinearConv": ((0, 1, 2), (3, 4, 5), (None, 6, 7)),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5), (None, 6, 7)),
    "QGemm": ((0, 1, 2), (3, 4, 5), (None, 7, 8)),
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
    "DynamicQuantizeMatMul": ((1, 2, 3),),
    "MatMulInteger": ((1, None, 3),),
    "ConvInteger": ((1, None, 3),),
    "MatMulNBits": ((1, 2, 3),),
    "GatherBlockQuantized": ((0, 2, 3),),
}
"""Positions of values, scale and zero point among the inputs of operators that take, or give, quantized values."""

_SEPARATOR = " > "
_MOST_WAYS = 200_000
_MOST_VALUES = 1 << 63

Part = Literal["scale", "zero_point"]


@dataclass(eq=False)
class Constant:
    """A constant tensor of the file and what the walk has found out about it."""

    name: str
    """Its name; behind the name of the node and of the graph where it belongs to an inner graph or a function."""
    tensor: TensorProto
    """The values; of a sparse tensor the ones that are not zero."""
    shape: tuple[int, ...]
    sparse_indices: TensorProto | None = None
    readers: dict[str, None] = field(default_factory=dict)
    """Paths of operators up to the one that computes, in the order of the file."""
    scales: list["Constant"] = field(default_factory=list)
    zero_points: list["Constant"] = field(default_factory=list)
    part: Part | None = None
    """What it is for quantized values, of another constant or of activations."""
    has_owner: bool = False
    """Whether it is listed among the scales or zero points of a constant; the first one if it serves several."""
    is_quantized: bool = False
    """Whether it has a scale or a zero point, be they listed here or with another part of the same weight."""
    packed_bits: int | None = None
    """Width of the values packed into the bytes of the tensor, where the reading operator says so (MatMulNBits)."""
    packed_values: int | None = None

    @property
    def parts(self) -> list[TensorProto]:
        """What the file keeps: the values, and of a sparse tensor their places."""
        return [self.tensor] if self.sparse_indices is None else [self.tensor, self.sparse_indices]

    @property
    def dtype(self) -> DataType:
        """Of the values, or of the bytes that they are packed into."""
        return DataType(self.tensor.data_type)

    @property
    def holds_levels(self) -> bool:
        """Whether the type is one that quantized values are kept in: an integer of at most 16 bits, or 8-bit float."""
        is_small = self.dtype.is_integer() or self.dtype.name.startswith(("FLOAT8", "FLOAT4"))
        return is_small and self.dtype.bitwidth <= 16

    @property
    def is_floating(self) -> bool:
        """Whether the type is floating point."""
        return self.dtype.is_floating_point() or self.dtype in (DataType.COMPLEX64, DataType.COMPLEX128)


@dataclass(frozen=True)
class _Trace:
    """A value of the graph that is made of a constant alone, or of rows of it (``is_selected``)."""

    constant: Constant
    path: tuple[str, ...] = ()
    is_selected: bool = False
    is_dequantized: bool = False
    stage: Literal["value", "product", "factor"] = "value"
    """"product" of activations with these levels, before its scale; "factor" of activations that this scale is a part of."""

    def through(self, op: str) -> "_Trace":
        # Behind a Gather by ids the rows are activations: only their dequantization still belongs to the constant.
        return self if self.is_selected and op in _VIEWS else replace(self, path=(*self.path, op))

    def end(self, op: str) -> None:
        path = self.path if self.is_selected else (*self.path, op)
        self.constant.readers[_SEPARATOR.join(path)] = None


_Values = dict[str, tuple[_Trace, ...]]


def find_constants(model: ModelProto) -> list[Constant]:
    """Find every constant tensor of a model, its readers, its scales and its zero points; external data need not be loaded.

    Returns:
        The constants in the order of the file: those of the graph, of the graphs inside its nodes, of its functions.
    """
    walk = _Walk({(function.domain, function.name): function for function in model.functions}, itertools.count())
    walk.graph(model.graph, "", {})
    for function in model.functions:
        walk.nodes(function, f"{function.name}/", {})
    return walk.found


def external_locations(constants: Iterable[Constant]) -> list[str]:
    """The other files in which constants of a model lie, relative to its folder."""
    regions = [external_region(tensor) for constant in constants for tensor in constant.parts]
    return sorted({region.location for region in regions if region is not None})


class _Walk:
    """A walk over a model, and the constants that it finds."""

    def __init__(self, functions: dict[tuple[str, str], FunctionProto], ways: Iterator[int]) -> None:
        self.functions, self.ways = functions, ways
        self.found: list[Constant] = []

    def graph(self, graph: GraphProto, scope: str, outer: _Values) -> None:
        values = dict(outer)
        for tensor in graph.initializer:
            self._add(Constant(scope + tensor.name, tensor, tuple(tensor.dims)), tensor.name, values)
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            self._add(Constant(scope + name, sparse.values, tuple(sparse.dims), sparse.indices), name, values)
        self.nodes(graph, scope, values)
        for output in graph.output:
            for trace in values.get(output.name, ()):
                trace.end("graph output")

    def nodes(self, graph: GraphProto | FunctionProto, scope: str, values: _Values) -> None:
        for node in graph.node:
            for _ in range(1 + sum(len(values.get(name, ())) for name in node.input)):
                if next(self.ways) > _MOST_WAYS:
                    raise ValueError(f"its constants go more than {_MOST_WAYS} ways through its operators and functions")
            for attribute in node.attribute:
                inner = {attribute.name: attribute.g} if attribute.HasField("g") else {}
                inner |= {f"{attribute.name}.{place}": each for place, each in enumerate(attribute.graphs)}
                for name, body in inner.items():
                    self.graph(body, f"{scope}{node.name or node.op_type}/{name}/", values)
                if node.op_type == "Constant" and attribute.name == "value":
                    self._add(Constant(scope + node.output[0], attribute.t, tuple(attribute.t.dims)), node.output[0], values)
                elif node.op_type == "Constant" and attribute.name == "sparse_value":
                    sparse = attribute.sparse_tensor
                    constant = Constant(scope + node.output[0], sparse.values, tuple(sparse.dims), sparse.indices)
                    self._add(constant, node.output[0], values)
            if (function := self.functions.get((node.domain, node.op_type))) is not None:
                self._call(node, function, values)
            elif node.op_type != "Constant":
                _visit(node, values)

    def _call(self, node: NodeProto, function: FunctionProto, values: _Values) -> None:
        """Follow constants through the body of a function, which counts as one operator to whoever reads the file."""
        body = {formal: values.get(name, ()) for formal, name in zip(function.input, node.input, strict=False)}
        given = {trace.constant: trace for of_one in body.values() for trace in of_one}
        readers = {constant: dict(constant.readers) for constant in given}
        others = {key: each for key, each in self.functions.items() if each is not function}  # no function may call itself
        _Walk(others, self.ways).nodes(function, "", body)  # its own constants count once, with the function
        carried = {trace.constant for name in function.output for trace in body.get(name, ())}
        for constant, trace in given.items():
            constant.readers = readers[constant]  # without the operators of the body
            if constant not in carried:
                trace.end(node.op_type)
        for formal, name in zip(function.output, node.output, strict=False):
            traces = [trace for trace in body.get(formal, ()) if trace.constant in given]
            values[name] = tuple(replace(trace, path=(*given[trace.constant].path, node.op_type)) for trace in traces)

    def _add(self, constant: Constant, name: str, values: _Values) -> None:
        for sides in (constant.shape, constant.tensor.dims):
            if min(sides, default=0) < 0 or math.prod(sides) >= _MOST_VALUES:
                raise ValueError(f"tensor '{constant.name}' has the shape {list(sides)}")
        self.found.append(constant)
        values[name] = (_Trace(constant),)


def _visit(node: NodeProto, values: _Values) -> None:
    """Carry the constants among a node's inputs to its outputs, or end them there; note which are the scales and zero points of which."""
    op, traces = node.op_type, [values.get(name, ()) for name in node.input]
    inputs = [tuple(trace for trace in of_one if trace.stage == "value") for of_one in traces]
    for levels, scale, zero_point in _QUANTIZED_INPUTS.get(op, ()):
        owners = _constants(inputs, levels)
        _claim(owners, "scale", _constants(inputs, scale))
        _claim(owners, "zero_point", _constants(inputs, zero_point))
        if op in ("MatMulNBits", "GatherBlockQuantized"):
            _note_packing(owners, node)
    carried, is_dequantized = {0} if op in _VIEWS or op == "DequantizeLinear" else set(), op == "DequantizeLinear"
    if op == "Concat" and all(inputs):
        carried = set(range(len(inputs)))
    elif op in ("Mul", "Sub", "Div") and len(inputs) == 2 and all(inputs):
        carried, is_dequantized = _spelled_out(op, inputs)
    is_selected = op == "Gather" and not (len(inputs) > 1 and inputs[1])
    outputs = _scaled_later(node, inputs, traces)
    for position, of_one in enumerate(inputs):
        for trace in of_one:
            if position in carried:
                selected, dequantized = trace.is_selected or is_selected, trace.is_dequantized or is_dequantized
                outputs.append(replace(trace.through(op), is_selected=selected, is_dequantized=dequantized))
            else:
                trace.end(op)
    if outputs:
        values.update(dict.fromkeys(node.output, tuple(outputs)))


def _spelled_out(op: str, inputs: list[tuple[_Trace, ...]]) -> tuple[set[int], bool]:
    """Follow a dequantization that is spelled out by Cast, Sub, Mul (or Div): the input that goes on, and whether it is levels no more."""
    if op == "Mul" and all(t.constant.holds_levels for t in inputs[0]) and not any(t.constant.is_floating for t in inputs[1]):
        _claim(_constants(inputs, 0), "scale", _constants(inputs, 1))  # levels of half-integer zero points are doubled, and stay levels
        return {0}, False
    are_floating = [all(t.constant.is_floating for t in of_one) for of_one in inputs]
    for levels, other in ((0, 1), (1, 0)) if op == "Mul" else ((0, 1),):
        are_levels = all(t.constant.holds_levels and not t.is_dequantized for t in inputs[levels])
        if are_levels and (op == "Sub" or are_floating[other]):
            _claim(_constants(inputs, levels), "zero_point" if op == "Sub" else "scale", _constants(inputs, other))
            return {levels}, op == "Mul"
    return ({0}, True) if op == "Mul" and all(are_floating) else (set(), False)


def _scaled_later(node: NodeProto, inputs: list[tuple[_Trace, ...]], traces: list[tuple[_Trace, ...]]) -> list[_Trace]:
    """Follow integer products to their scale: ``Mul(Cast(MatMulInteger(activations, levels)), Mul(scale of the activations, scale))``."""
    if node.op_type in ("MatMulInteger", "ConvInteger"):
        return [replace(trace, stage="product") for trace in inputs[1]]
    if node.op_type in _VIEWS:
        return [trace for trace in traces[0] if trace.stage != "value"]
    factors: list[_Trace] = []
    for one, other in ((0, 1), (1, 0)) if node.op_type == "Mul" and len(traces) == 2 else ():
        owners = [trace.constant for trace in traces[one] if trace.stage == "product"]
        scales = [trace for trace in traces[other] if trace.stage != "product" and trace.constant.is_floating]
        if owners:
            _claim(owners, "scale", [trace.constant for trace in scales])
        elif not inputs[one]:
            factors += [replace(trace, stage="factor") for trace in scales]
    return factors


def _constants(inputs: list[tuple[_Trace, ...]], position: int | None) -> list[Constant]:
    if position is None or position >= len(inputs):
        return []
    return [trace.constant for trace in inputs[position]]


def _claim(owners: list[Constant], part: Part, constants: list[Constant]) -> None:
    if constants:
        for owner in owners:
            owner.is_quantized = True
    for constant in constants:
        constant.part = part
        if owners and not constant.has_owner:
            constant.has_owner = True
            (owners[0].scales if part == "scale" else owners[0].zero_points).append(constant)


def _note_packing(constants: list[Constant], node: NodeProto) -> None:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    for constant in constants:
        if constant.dtype == DataType.UINT8:
            bits = attributes.get("bits", 4)
            constant.packed_bits = bits
            packed = math.prod(constant.shape) * 8 // bits  # MatMulNBits pads the last block of every column
            constant.packed_values = attributes.get("N", 0) * attributes.get("K", 0) or packed
