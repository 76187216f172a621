"""Proves of a written file that its integer products are exact on every processor and for any input.

The file is read as any other: every product of integers is looked up in the graph, the constants that its weight hangs on are computed
by onnx's reference evaluator, and the levels that result go to the one rule, :func:`.layout.products.is_exact`. Nothing here knows how
the export has made them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, external_data_helper, inliner
from onnx.reference import ReferenceEvaluator

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.products import EXACT_LEVEL, is_exact

_INTEGER_PRODUCTS = {"MatMulInteger": 1, "ConvInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3}
"""Operator -> position of the weight."""
_FUSED_PRODUCTS = ("MatMul", "Gemm", "Conv")
"""What onnxruntime makes an integer product of where both factors come from a DequantizeLinear ..."""
_MOVING = ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""... through these, which it moves behind the product or in front of the DequantizeLinear."""


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """A node that multiplies integers, or that onnxruntime makes one of."""

    name: str
    """The node's; that of its output where it has none."""
    operator: str
    activation: str
    """Name of the value that the weight is multiplied with, in integers."""
    levels: np.ndarray | None
    """The weight as the kernel reads it; None if the graph computes it from its inputs."""


def find_products(path: Path) -> list[IntegerProduct]:
    """Find every integer product of a file, in its graph, the bodies of its nodes and the functions that it calls, and compute its weight.

    Args:
        path: an ONNX file.
    """
    model = onnx.load(path, load_external_data=False)
    if model.functions:
        model = inliner.inline_local_functions(model)
    graphs = list(_graphs(model.graph))
    producers = {output: node for graph in graphs for node in graph.node for output in node.output}
    constants = _Constants(model, path.parent, producers)
    readers: dict[str, list[NodeProto]] = {}
    for node in (node for graph in graphs for node in graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in (node for graph in graphs for node in graph.node):
        if _gets_levels_at_load(node, producers, readers):
            found.append(IntegerProduct(node.name or node.output[0], node.op_type, node.input[0], None))
        if (factors := _factors(node, producers)) is not None:
            name = node.name or node.output[0]
            found.append(IntegerProduct(name, node.op_type, factors[0], constants.value(factors[1])))
    return found


def check_products(path: Path) -> None:
    """Check that no integer product of a file can saturate or overflow, on any processor and for any input.

    Args:
        path: a written file.

    Raises:
        ExportError: One could.
    """
    for product in find_products(path):
        if product.levels is None:
            raise ExportError(
                f"the integer product {product.name!r} ({product.operator}) has no constant levels in the file: it may saturate. "
                "The file was not written; please report this model."
            )
        if not is_exact(product.levels):
            low, high = product.levels.min(), product.levels.max()
            raise ExportError(
                f"the integer product {product.name!r} ({product.operator}) multiplies {product.levels.dtype} levels from {low} to {high}: "
                f"beyond +-{EXACT_LEVEL} they saturate on processors without dot products of 8 bits. The file was not written; "
                'please report this model. activations="float" does without such products.'
            )


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(body)


def _factors(node: NodeProto, producers: dict[str, NodeProto]) -> tuple[str, str] | None:
    """Names of activation and weight as integers; None for other nodes."""
    if node.op_type in _INTEGER_PRODUCTS:
        return node.input[0], node.input[_INTEGER_PRODUCTS[node.op_type]]
    if node.op_type not in _FUSED_PRODUCTS or node.domain:
        return None
    sources = [_dequantized(name, producers) for name in node.input[:2]]
    known = [source for source in sources if source is not None]
    return (known[0], known[1]) if len(known) == 2 else None


def _gets_levels_at_load(node: NodeProto, producers: dict[str, NodeProto], readers: dict[str, list[NodeProto]]) -> bool:
    """Whether onnxruntime quantizes the float weight of a product by itself: between a DequantizeLinear and a QuantizeLinear it does."""
    if node.op_type not in (*_FUSED_PRODUCTS, "ConvTranspose") or node.domain or _dequantized(node.input[0], producers) is None:
        return False
    if _dequantized(node.input[1], producers) is not None:
        return False
    pending = list(readers.get(node.output[0], ()))
    if len(pending) == 1 and pending[0].op_type == "Add":
        pending = list(readers.get(pending[0].output[0], ()))
    while pending:
        reader = pending.pop()
        if reader.op_type == "QuantizeLinear":
            return True
        if reader.op_type in (*_MOVING, "Relu", "Clip"):
            pending += readers.get(reader.output[0], ())
    return False


def _dequantized(name: str, producers: dict[str, NodeProto]) -> str | None:
    """Name of the integers that a factor is made of, None if it is not.

    With a scale for each block a weight is no factor of an integer product: onnxruntime (1.31) has no kernel that takes such scales.
    """
    node = producers.get(name)
    while node is not None and node.op_type in _MOVING and not node.domain:
        node = producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    has_blocks = any(attribute.name == "block_size" and attribute.i > 0 for attribute in node.attribute)
    return None if has_blocks else node.input[0]


class _Constants:
    """Computes values that hang on the initializers of a graph alone."""

    def __init__(self, model: ModelProto, folder: Path, producers: dict[str, NodeProto]) -> None:
        self._model = model
        self._folder = folder
        self._tensors = {tensor.name: tensor for graph in _graphs(model.graph) for tensor in graph.initializer}
        self._producers = producers

    def value(self, name: str) -> np.ndarray | None:
        """The value of that name; None if it needs an input of the graph."""
        nodes: list[NodeProto] = []
        tensors: dict[str, TensorProto] = {}
        if not self._collect(name, nodes, tensors):
            return None
        output = onnx.helper.make_empty_tensor_value_info(name)
        graph = onnx.helper.make_graph(nodes, "constant", [], [output], list(tensors.values()))
        model = onnx.helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        values: Any = ReferenceEvaluator(model).run(None, {})
        return np.asarray(values[0])

    def _collect(self, name: str, nodes: list[NodeProto], tensors: dict[str, TensorProto]) -> bool:
        """Gather what a value hangs on, in the order of computation; False if that is not initializers alone."""
        if name in self._tensors:
            tensors.setdefault(name, self._loaded(self._tensors[name]))
            return True
        node = self._producers.get(name)
        if node is None or not all(self._collect(source, nodes, tensors) for source in node.input if source):
            return False
        if not any(known is node for known in nodes):
            nodes.append(node)
        return True

    def _loaded(self, tensor: TensorProto) -> TensorProto:
        if not external_data_helper.uses_external_data(tensor):
            return tensor
        loaded = TensorProto()
        loaded.CopyFrom(tensor)
        external_data_helper.load_external_data_for_tensor(loaded, str(self._folder))
        return loaded
