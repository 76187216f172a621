"""Finds what reads a weight: the linear layers that onnxruntime can fuse with it, through Transpose, Slice and Split."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.emitter import constant_of, make_node, replace_node

_MATRIX = 2
_REARRANGING = {"Cast", "Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


@dataclass(frozen=True, eq=False)
class LinearUse:
    """``activation @ weight[K, N] (+ bias)``: a MatMul or Gemm whose second input is a matrix of the weight's own values."""

    node: ir.Node
    activation: ir.Value
    bias: ir.Value | None
    transposed: bool
    """Whether the weight is [N, K], as that of nn.Linear, and reaches the product transposed."""
    rows: range | None
    """The output channels that this product reads, None for all of them (q, k and v of one weight are read apart)."""

    @property
    def channel_axis(self) -> int:
        """The axis of the weight, as PyTorch has it, that becomes N."""
        return 0 if self.transposed else 1

    def num_rows(self, sizes: Mapping[str, int]) -> int:
        """Rows of the activation where symbolic sizes are what they are in the example; 1 if the graph does not tell."""
        shape = self.activation.shape
        known = shape.evaluate(sizes) if shape is not None else ()
        leading = [size for size in known[:-1] if isinstance(size, int)]
        return int(np.prod(leading, dtype=np.int64)) if len(leading) == len(known) - 1 else 1

    def label(self, weight: str) -> str:
        """A name for what this product reads of a weight."""
        return weight if self.rows is None else f"{weight}.{self.rows.start}_{self.rows.stop}"

    @property
    def is_open(self) -> bool:
        """Whether the graph takes other numbers of rows than the example's."""
        shape = self.activation.shape
        return shape is None or not all(isinstance(size, int) for size in shape[:-1])


def replace_product(use: LinearUse, nodes: list[ir.Node]) -> None:
    """Put nodes, the last of which gives the product, and an Add of the bias in the place of a MatMul or Gemm."""
    if use.bias is not None:
        product = nodes[-1].outputs[0]
        nodes = [*nodes, make_node("Add", [product, use.bias], f"{product.name}.biased")]
    replace_node(use.node, nodes)


@dataclass(frozen=True)
class _Path:
    """How a value was made of the weight."""

    transposed: bool = False
    rows: range | None = None


@dataclass(frozen=True, eq=False)
class Uses:
    """Everything that reads a weight."""

    linear: tuple[LinearUse, ...]
    gathers: tuple[ir.Node, ...]
    """The Gather nodes that pick rows of it, as embeddings do."""
    convolutions: tuple[ir.Node, ...]
    """The Conv nodes whose filters it is."""
    others: tuple[str, ...]
    """What else reads it, as op types; "output" for a graph that gives it out."""
    turned: frozenset[bool]
    """How its readers have it: as PyTorch has it (False), behind a Transpose (True)."""


def find_uses(weight: ir.Value, axis: int, graph: ir.Graph) -> Uses:
    """Find what reads a placeholder's output in the main graph; ``axis`` is that of the weight's output channels."""
    linear: list[LinearUse] = []
    gathers: list[ir.Node] = []
    convolutions: list[ir.Node] = []
    others: list[str] = []
    turned: set[bool] = set()
    pending = [(weight, _Path())]
    while pending:
        value, path = pending.pop(0)
        if value.is_graph_output():
            others.append("output")
            turned.add(path.transposed)
        for node, index in value.uses():
            readable = value.shape is not None and len(value.shape) == _MATRIX and node.graph is graph and not node.domain
            steps = _steps(node, value, path, axis) if readable and index == 0 else {}
            use = _linear_use(node, path) if readable and index == 1 else None
            is_whole = path == _Path() and node.graph is graph and not node.domain
            if use is not None:
                linear.append(use)
                turned.add(use.transposed)
            elif is_whole and node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == axis == 0:
                gathers.append(node)
                turned.add(False)
            elif is_whole and node.op_type == "Conv" and index == 1 and axis == 0:
                convolutions.append(node)
                turned.add(False)
            elif steps:
                pending.extend(steps.items())
            else:
                others.extend(_final_readers(node))
                turned.add(path.transposed or node.op_type == "Transpose")
    return Uses(tuple(linear), tuple(gathers), tuple(convolutions), tuple(dict.fromkeys(others)), frozenset(turned))


def _linear_use(node: ir.Node, path: _Path) -> LinearUse | None:
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or activation is weight:
        return None
    given = node.attributes
    if node.op_type == "MatMul" and activation.shape is not None and len(activation.shape) >= _MATRIX:
        return LinearUse(node, activation, None, path.transposed, path.rows)
    if node.op_type == "Gemm" and not given.get_int("transA", 0) and given.get_float("alpha", 1.0) == given.get_float("beta", 1.0) == 1:
        bias = node.inputs[2] if len(node.inputs) > _MATRIX else None
        return LinearUse(node, activation, bias, path.transposed != bool(given.get_int("transB", 0)), path.rows)
    return None


def _steps(node: ir.Node, value: ir.Value, path: _Path, axis: int) -> dict[ir.Value, _Path]:
    """The outputs of a node that only rearranges the weight, and how; empty for any other node."""
    if node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0):
        return {node.outputs[0]: replace(path, transposed=not path.transposed)}
    channels = value.shape[1 - axis if path.transposed else axis] if value.shape is not None else None
    if not isinstance(channels, int) or path.rows is not None:
        return {}
    here = 1 - axis if path.transposed else axis
    if node.op_type == "Slice":
        return _slice_steps(node, path, here, channels)
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) % _MATRIX == here:
        equal = [channels // len(node.outputs)] * len(node.outputs)
        sizes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else np.array(equal)
        if sizes is not None and int(sum(sizes)) == channels:
            stops = np.cumsum(sizes)
            ranges = (range(int(stop - size), int(stop)) for size, stop in zip(sizes, stops, strict=True))
            return {output: replace(path, rows=rows) for output, rows in zip(node.outputs, ranges, strict=True)}
    return {}


def _slice_steps(node: ir.Node, path: _Path, axis: int, channels: int) -> dict[ir.Value, _Path]:
    defaults = [None, None, np.array([0]), np.array([1])][len(node.inputs) - 1 :]
    given = [*(constant_of(value) for value in node.inputs[1:]), *defaults]  # starts, ends, axes, steps
    bounds = [int(part[0]) for part in given if part is not None and part.size == 1]
    if len(bounds) != 4 or bounds[2] % _MATRIX != axis or bounds[3] != 1:
        return {}
    rows = range(channels)[bounds[0] : bounds[1]]
    return {node.outputs[0]: replace(path, rows=rows)} if len(rows) else {}


def _final_readers(node: ir.Node) -> list[str]:
    """What reads a weight behind the nodes that rearrange it: LSTM, not the Slice that sorts its gates."""
    if node.op_type not in _REARRANGING or node.domain:
        return [node.op_type]
    behind = [reader for output in node.outputs for reader in output.consumers()]
    return [op_type for reader in behind for op_type in _final_readers(reader)] or [node.op_type]
