"""Adds initializers and nodes to the beginning of a graph, under readable names that nobody else has."""

from collections.abc import Sequence
from itertools import count

import numpy as np
import onnx_ir as ir


class Emitter:
    """Collects what the layout rules add to a graph; :meth:`flush` puts it in.

    All nodes depend on initializers alone, so that they belong before every other node.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
        self._taken |= {value.name for value in graph.inputs}

    def initializer(self, name: str, tensor: ir.TensorProtocol | np.ndarray) -> ir.Value:
        """Add an initializer, its name made unique."""
        if isinstance(tensor, np.ndarray):
            tensor = ir.Tensor(np.ascontiguousarray(tensor))
        unique = self.unique(name)
        tensor.name = unique
        value = ir.Value(name=unique, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        **attributes: ir.convenience.SupportedAttrTypes,
    ) -> ir.Value:
        """Add a node of the default domain with one output called ``name``; its type is that of the first input, or ``dtype``."""
        node = make_node(op_type, inputs, self.unique(name), **attributes)
        first = inputs[0]
        node.outputs[0].dtype = dtype or (first.dtype if first is not None else None)
        self._nodes.append(node)
        return node.outputs[0]

    def unique(self, name: str) -> str:
        """``name``, or with a number behind it where it is taken."""
        found = next(n for n in (name, *(f"{name}_{i}" for i in count(2))) if n not in self._taken) if name in self._taken else name
        self._taken.add(found)
        return found

    def flush(self) -> None:
        """Put the collected nodes before the first node of the graph."""
        if self._nodes:
            self._graph.insert_before(self._graph[0], self._nodes)
        self._nodes = []


def make_node(
    op_type: str, inputs: Sequence[ir.Value | None], output: str, **attributes: ir.convenience.SupportedAttrTypes
) -> ir.Node:
    """A node of the default domain with one output, both called ``output``."""
    node = ir.node(op_type, inputs, attributes)
    node.name = output
    node.outputs[0].name = output
    return node
