"""Finds what reads a weight: the linear layers that onnxruntime can fuse with it, through Transpose, Slice and Split."""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

_MATRIX = 2


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

    def num_rows(self, sizes: dict[str, int]) -> int:
        """Rows of the activation at the example's size; 1 if the graph does not tell.

        Args:
            sizes: name of a symbolic size -> what it is in the example.
        """
        shape = self.activation.shape
        known = shape.evaluate(sizes) if shape is not None else ()
        leading = [size for size in known[:-1] if isinstance(size, int)]
        return int(np.prod(leading, dtype=np.int64)) if len(leading) == len(known) - 1 else 1


@dataclass(frozen=True)
class _Path:
    """How a value was made of the weight."""

    transposed: bool = False
    rows: range | None = None


@dataclass(frozen=True, eq=False)
class Uses:
    """Everything that reads a weight."""

    linear: tuple[LinearUse, ...]
    others: tuple[str, ...]
    """What else reads it, as op types; "output" for a graph that gives it out."""


def find_uses(weight: ir.Value, axis: int, graph: ir.Graph) -> Uses:
    """Find what reads the value of a placeholder.

    Args:
        weight: the placeholder's output.
        axis: the output channel axis of the weight.
        graph: the main graph; what reads the weight in the body of an If or Loop is not fused.
    """
    linear: list[LinearUse] = []
    others: list[str] = []
    pending = [(weight, _Path())]
    while pending:
        value, path = pending.pop(0)
        if value.is_graph_output():
            others.append("output")
        for node, index in value.uses():
            readable = value.shape is not None and len(value.shape) == _MATRIX and node.graph is graph and not node.domain
            steps = _steps(node, value, path, axis) if readable and index == 0 else {}
            use = _linear_use(node, path) if readable and index == 1 else None
            if use is not None:
                linear.append(use)
            elif steps:
                pending.extend(steps.items())
            else:
                others.append(node.op_type)
    return Uses(tuple(linear), tuple(dict.fromkeys(others)))


def _linear_use(node: ir.Node, path: _Path) -> LinearUse | None:
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or activation is weight:
        return None
    if node.op_type == "MatMul":
        return LinearUse(node, activation, None, path.transposed, path.rows) if _rank(activation) >= _MATRIX else None
    if node.op_type == "Gemm" and not _integer(node, "transA") and _scalar(node, "alpha") == 1 and _scalar(node, "beta") == 1:
        bias = node.inputs[2] if len(node.inputs) > _MATRIX else None
        return LinearUse(node, activation, bias, path.transposed != bool(_integer(node, "transB")), path.rows)
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
    if node.op_type == "Split" and _integer(node, "axis") % _MATRIX == here:
        sizes = _constant(node, 1)
        if sizes is not None:
            stops = np.cumsum(sizes)
            ranges = (range(int(stop - size), int(stop)) for size, stop in zip(sizes, stops, strict=True))
            return {output: replace(path, rows=rows) for output, rows in zip(node.outputs, ranges, strict=True)}
    return {}


def _slice_steps(node: ir.Node, path: _Path, axis: int, channels: int) -> dict[ir.Value, _Path]:
    starts, ends = _constant(node, 1), _constant(node, 2)
    axes = _constant(node, 3) if len(node.inputs) > 3 else np.array([0])
    steps = _constant(node, 4) if len(node.inputs) > 4 else np.array([1])
    if any(part is None or part.size != 1 for part in (starts, ends, axes, steps)):
        return {}
    if int(axes[0]) % _MATRIX != axis or int(steps[0]) != 1:
        return {}
    rows = range(channels)[int(starts[0]) : int(ends[0])]
    return {node.outputs[0]: replace(path, rows=rows)} if len(rows) else {}


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes.get_int(name, 0)


def _scalar(node: ir.Node, name: str) -> float:
    return node.attributes.get_float(name, 1.0)
