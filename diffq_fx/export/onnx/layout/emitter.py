"""Adds initializers and nodes to the beginning of a graph, under names that nobody else has."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from diffq_fx.storage.packing import pack_levels

Attribute = int | float | str | Sequence[int]
_BYTE = 8


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

    def sizes(self, *sizes: int) -> ir.Value:
        """A shape or positions, as an initializer."""
        return self.initializer("sizes", np.array(sizes, dtype=np.int64))

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str = "", *, dtype: ir.DataType | None = None, **attributes: Attribute
    ) -> ir.Value:
        """Add a node of the default domain with one output called ``name``; its type is that of the first input, or ``dtype``."""
        node = make_node(op_type, inputs, self.unique(name or op_type), **attributes)
        first = inputs[0]
        inferred = dtype or (first.dtype if first is not None else None)
        if inferred is not None:
            node.outputs[0].dtype = inferred
        self._nodes.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in another type, itself if it has that type."""
        return value if value.dtype == dtype else self.op("Cast", [value], dtype=dtype, to=int(dtype))

    def argsort(self, values: ir.Value, count: ir.Value) -> ir.Value:
        """Add the node that sorts ``count`` whole numbers, equal ones in their order; gives their places."""
        node = ir.node("TopK", [values, count], {"largest": 0}, num_outputs=2)
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


def take_place(new: ir.Value, old: ir.Value, old_name: str) -> None:
    """Let everything that reads a value read another one; an output of the graph keeps its name, and the old value is called otherwise."""
    describe_like(new, old)
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.{old_name}", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def replace_node(old: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put nodes in the place of one of the same graph, the last one's output in that of its own."""
    if old.graph is not None:
        ir.convenience.replace_nodes_and_values(old.graph, old, [old], nodes, old.outputs, nodes[-1].outputs)


def make_node(op_type: str, inputs: Sequence[ir.Value | None], output: str, **attributes: Attribute) -> ir.Node:
    """A node of the default domain with one output, both called ``output``; missing inputs at the end are left out."""
    given = max(place for place, value in enumerate(inputs, 1) if value is not None)
    node = ir.node(op_type, inputs[:given], attributes)
    node.name = output
    node.outputs[0].name = output
    return node


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer or Constant node; None for what the graph computes."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node of the same graph that alone reads a value, if it is one of the default domain."""
    readers = value.consumers()
    alone = len(readers) == 1 and not value.is_graph_output() and not readers[0].domain
    return readers[0] if alone and readers[0].graph is value.graph else None


def integer_type(bits: int, *, signed: bool) -> ir.DataType:
    """The ONNX type of a container of 2, 4, 8 or 16 bits.

    Example:
        >>> integer_type(4, signed=False).name
        'UINT4'
    """
    return ir.DataType[f"{'' if signed else 'U'}INT{bits}"]


def integer_tensor(levels: np.ndarray, bits: int, *, signed: bool) -> ir.TensorProtocol:
    r"""Put levels into a container of 2, 4, 8 or 16 bits, serialized as raw_data: the least significant bits first.

    Example:
        >>> integer_tensor(np.array([[-8, 7, 1]]), 4, signed=True).tobytes()
        b'x\x01'
    """
    dtype = integer_type(bits, signed=signed)
    if bits >= _BYTE:
        return ir.Tensor(np.ascontiguousarray(levels, dtype=dtype.numpy()))
    unsigned = torch.from_numpy(np.ascontiguousarray(levels.astype(np.uint8) & (2**bits - 1)))
    return ir.PackedTensor(pack_levels(unsigned, bits).numpy(), dtype, shape=levels.shape)
