"""Proves of a written file that its integer products are exact on every processor and for any input.

The file is read as any other: every product of integers is looked up in the graph, the constants that its weight hangs on are computed
by onnx's reference evaluator, and the levels that result go to the one rule, :func:`.layout.products.is_exact`. Nothing here knows how
the export has made them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import InlinePass

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.products import EXACT_LEVEL, MAX_INPUTS, is_exact
from diffq_fx.export.onnx.layout.rounding import PRODUCTS, dequantize_of, leads_to_integers, with_bias

_INTEGER_PRODUCTS = {"MatMulInteger": 1, "ConvInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3}
"""Operator -> position of the weight."""


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """A node that multiplies integers, or that onnxruntime makes one of."""

    name: str
    """The node's; that of its output where it has none."""
    operator: str
    levels: np.ndarray | None
    """The weight as the kernel reads it; None if the graph computes it from its inputs, or onnxruntime when it loads the file."""
    inputs: int = 0
    """How many products are added up for one output."""


def find_products(path: Path) -> list[IntegerProduct]:
    """Every integer product of a file, in its graph, the bodies of its nodes and the functions that it calls, with its weight."""
    model = ir.load(path)
    InlinePass()(model)
    found = []
    for node in model.graph.all_nodes():
        name = node.name or str(node.outputs[0].name)
        if _gets_levels_at_load(node):
            found.append(IntegerProduct(name, node.op_type, None))
        if (weight := _integer_weight(node)) is not None:
            levels = _constant(weight, model)
            found.append(IntegerProduct(name, node.op_type, levels, 0 if levels is None else _count_inputs(node, levels, model)))
    return found


def check_products(path: Path) -> None:
    """Check that no integer product of a written file can saturate or overflow, on any processor and for any input.

    Raises:
        ExportError: One could.
    """
    for product in find_products(path):
        if product.levels is None:
            raise ExportError(
                f"the integer product {product.name!r} ({product.operator}) has no constant levels in the file: it may saturate. "
                "The file was not written; please report this model."
            )
        if product.inputs > MAX_INPUTS:
            raise ExportError(
                f"the integer product {product.name!r} ({product.operator}) adds up {product.inputs} inputs: int32 holds the sum of "
                f'{MAX_INPUTS}. The file was not written; please report this model. activations="float" does without such products.'
            )
        if not is_exact(product.levels):
            low, high = product.levels.min(), product.levels.max()
            raise ExportError(
                f"the integer product {product.name!r} ({product.operator}) multiplies {product.levels.dtype} levels from {low} to {high}: "
                f"beyond +-{EXACT_LEVEL} they saturate on processors without dot products of 8 bits. The file was not written; "
                'please report this model. activations="float" does without such products.'
            )


def _integer_weight(node: ir.Node) -> ir.Value | None:
    if node.op_type in _INTEGER_PRODUCTS:
        return node.inputs[_INTEGER_PRODUCTS[node.op_type]]
    return _dequantized(node.inputs[1]) if _reads_integers(node) and node.op_type != "ConvTranspose" else None


def _count_inputs(node: ir.Node, levels: np.ndarray, model: ir.Model) -> int:
    if "Conv" in node.op_type:
        return math.prod(levels.shape[1:])
    moved = _constant(node.inputs[1], model) if node.op_type in PRODUCTS and node.inputs[1] is not None else levels
    shape = levels.shape if moved is None else moved.shape
    return shape[-1] if len(shape) == 1 or node.attributes.get_int("transB", 0) else shape[-2]


def _gets_levels_at_load(node: ir.Node) -> bool:
    """Whether onnxruntime quantizes the float weight of a product by itself: between a DequantizeLinear and a QuantizeLinear it does."""
    return _reads_integers(node) and _dequantized(node.inputs[1]) is None and leads_to_integers(with_bias(node).outputs[0])


def _reads_integers(node: ir.Node) -> bool:
    return node.op_type in PRODUCTS and not node.domain and _dequantized(node.inputs[0]) is not None


def _dequantized(value: ir.Value | None) -> ir.Value | None:
    """The integers that a factor is made of, None if it is not.

    A weight with a scale for each block is none: onnxruntime (1.31) has no integer product that takes such scales.
    """
    node = dequantize_of(value)
    return None if node is None or node.attributes.get_int("block_size", 0) else node.inputs[0]


def _constant(value: ir.Value, model: ir.Model) -> np.ndarray | None:
    """A value that hangs on initializers alone; None if it needs an input of the graph."""
    nodes: dict[ir.Node, None] = {}
    tensors: dict[ir.Value, ir.TensorProtocol] = {}
    if not _collect(value, nodes, tensors):
        return None
    made = [helper.make_tensor(str(known.name), t.dtype, t.shape.numpy(), t.tobytes(), raw=True) for known, t in tensors.items()]
    output = helper.make_empty_tensor_value_info(str(value.name))
    graph = helper.make_graph([ir.to_proto(node) for node in nodes], "constant", [], [output], made)
    opsets = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    values: Any = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)).run(None, {})
    return np.asarray(values[0])


def _collect(value: ir.Value, nodes: dict[ir.Node, None], tensors: dict[ir.Value, ir.TensorProtocol]) -> bool:
    """Gather what a value hangs on, in the order of computation; False if that is not initializers alone."""
    node = value.producer()
    if node is None:
        if value.const_value is not None:
            tensors[value] = value.const_value
        return value.const_value is not None
    if not all(source is None or _collect(source, nodes, tensors) for source in node.inputs):
        return False
    nodes[node] = None
    return True
