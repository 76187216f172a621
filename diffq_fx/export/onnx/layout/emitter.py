"""Adds initializers and nodes to the beginning of a graph, under readable names that nobody else has."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Attribute = int | float | str | Sequence[int]


class Emitter:
    """Collects what the layout rules add to a graph; :meth:`flush` puts it in.

    All nodes depend on initializers alone, so that they belong before every other node.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._nodes: list[ir.Node] = []
        self._taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
        self._taken |= {value.name for value in graph.inputs}

    def initializer(self, name: str, tensor: ir.TensorProtocol | np.ndarray | np.generic) -> ir.Value:
        """Add an initializer, its name made unique."""
        if isinstance(tensor, np.ndarray | np.generic):
            tensor = ir.tensor(np.array(tensor, order="C"))
        unique = self.unique(name)
        tensor.name = unique
        value = ir.val(unique, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """Add a node of the default domain with one output called ``name``; its type is that of the first input, or ``dtype``."""
        node = make_node(op_type, inputs, self.unique(name), **attributes)
        first = inputs[0]
        inferred = dtype or (first.dtype if first is not None else None)
        if inferred is not None:
            node.outputs[0].dtype = inferred
        self._nodes.append(node)
        return node.outputs[0]

    def argsort(self, values: ir.Value, count: ir.Value, name: str) -> ir.Value:
        """Add the nodes that sort ``count`` whole numbers, equal ones in their order; gives their places."""
        node = ir.node("TopK", [values, count], {"largest": 0}, num_outputs=2)
        node.name = self.unique(name)
        for output, label in zip(node.outputs, (".values", ""), strict=True):
            output.name = self.unique(f"{name}.sorted{label}")
        node.outputs[1].dtype = ir.DataType.INT64
        self._nodes.append(node)
        return node.outputs[1]

    def unique(self, name: str) -> str:
        """``name``, or with a number behind it where it is taken."""
        found, number = name, 2
        while found in self._taken:
            found, number = f"{name}_{number}", number + 1
        self._taken.add(found)
        return found

    def flush(self) -> None:
        """Put the collected nodes before the first node of the graph."""
        if self._nodes:
            self.graph.insert_before(self.graph[0], self._nodes)
        self._nodes = []


def describe_like(new: ir.Value, old: ir.Value) -> None:
    """Give a value the shape and type of the one whose place it takes."""
    new.shape = old.shape
    if old.dtype is not None:
        new.dtype = old.dtype


def make_node(op_type: str, inputs: Sequence[ir.Value | None], output: str, **attributes: Attribute) -> ir.Node:
    """A node of the default domain with one output, both called ``output``."""
    node = ir.node(op_type, inputs, attributes)
    node.name = output
    node.outputs[0].name = output
    return node
