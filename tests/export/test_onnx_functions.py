"""Each weight is one node of the graph: a standard DequantizeLinear, or a function of that name that every reader of ONNX functions takes."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, inliner
from onnx.reference import ReferenceEvaluator
from stored_models import Conv, Linear, Parallel, Swapped, Tied, assert_same, optimized, optimized_ops, run_exact, store
from torch import nn
from torch.nn import functional as F

from diffq_fx.export import export_onnx, read_metadata
from diffq_fx.export.onnx import saving
from diffq_fx.export.onnx.inspection import inspect_onnx
from diffq_fx.export.onnx.signatures import index_bounds

MIXED = torch.tensor([2, 4, 8, 12])[torch.randint(4, (24, 1))]
MIXED_ROWS = torch.tensor([2, 4, 8])[torch.arange(512) % 3][:, None]
IMAGES = torch.randn(2, 16, 9, 9)
WEIGHTS = {
    "affine": {"bits": 4},
    "affine too": {"bits": 4},
    "symmetric": {"bits": 4, "grid": "symmetric"},
    "wide": {"bits": 12},
    "mixed": {"bits": MIXED},
    "blocks": {"bits": 4, "group": 32, "ranges": 32},
    "tensor": {"bits": 8, "group": "tensor", "ranges": "tensor"},
}


def convolutions(names=WEIGHTS, convolve=F.conv2d, shape=(24, 16, 3, 3), **options):
    return Parallel(*(Conv(convolve, shape, name=name.replace(" ", "."), **{**WEIGHTS[name], **options}) for name in names)).eval()


def leaves(outputs):
    return tuple(torch.utils._pytree.tree_leaves(outputs))


def nodes_of_weights(graph):
    """The nodes that hang on initializers alone."""
    constants = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.input and constants.issuperset(node.input)]


def test_a_weight_is_one_node(path, tmp_path):
    model = convolutions()
    export_onnx(model, IMAGES, path)
    file = onnx.load(path)
    onnx.checker.check_model(path, full_check=True)
    calls = nodes_of_weights(file.graph)
    assert [node.name for node in calls] == [f"{name.replace(' ', '.')}.dequantized" for name in WEIGHTS]
    assert {node.domain for node in calls} == {"diffq_fx"}
    assert len(file.graph.node) == 2 * len(WEIGHTS)
    assert len(file.functions) == 5, "of bytes with and without zero points, of wide levels, of parts, of blocks"
    assert calls[0].op_type == calls[1].op_type == "DequantizeLinear"
    assert list(file.functions[0].input) == ["levels", "scale", "zero_point"]
    assert [list(function.output) for function in file.functions] == [["weight"]] * 5
    results = [(node.op_type, node.output[0]) for function in file.functions for node in function.node if node.input]
    assert all(name.startswith(kind) or name == "weight" for kind, name in results), "a viewer shows these"
    imports = {entry.domain: entry.version for entry in file.opset_import}
    assert imports.pop("diffq_fx") == 1
    assert all({entry.domain: entry.version for entry in function.opset_import} == imports for function in file.functions)
    assert set(optimized_ops(path, tmp_path)) <= {"Conv", "ReorderInput", "ReorderOutput"}, "inlined, and folded at load"
    assert_same(run_exact(path, IMAGES), model(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_reference_evaluator_reads_them(dtype, path):
    model = Parallel(convolutions(), convolutions(["affine", "blocks"], F.conv_transpose2d, (16, 24, 3, 3), axis=1)).eval()
    if dtype == torch.float16:
        layers = Linear(16, 24, 4, name="first"), Linear(16, 24, MIXED.clamp(max=8), name="second")
        for layer in layers:
            layer.weight.spec = dataclasses.replace(layer.weight.spec, dtype=dtype)
        model = Parallel(*layers).eval().half()
    x = (IMAGES if dtype == torch.float32 else torch.randn(3, 16)).to(dtype)
    export_onnx(model, x, path)
    file = onnx.load(path)
    found = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x.numpy()})
    expected = [leaf for leaf in torch.utils._pytree.tree_leaves(model(x))]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other.detach().numpy()).max() <= (1e-4 if dtype == torch.float32 else 5e-3) * np.abs(one).max()


class Both(nn.Module):
    """A model of two inputs: products of the first one, filters of the second."""

    def __init__(self):
        super().__init__()
        layers = [Linear(512, 512, bits, name=f"w{bits}") for bits in (4, 8)] + [
            Linear(512, 512, MIXED_ROWS, name="parts", grid="symmetric")
        ]
        self.layers, self.filters = nn.ModuleList(layers), Conv(F.conv2d, (24, 16, 3, 3), 4, name="filters")

    def forward(self, x, images):
        return *(layer(x) for layer in self.layers), self.filters(images)


FUSED = {
    "float": {"MatMulNBits": 3, "Conv": 1},
    "dynamic": {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3, "Conv": 1},
    "int8": {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3, "QLinearConv": 1},
}


BODIES = {
    "float": {("DequantizeLinear", "weight")},
    "dynamic": {("DynamicQuantizeMatMul", "product"), ("DequantizeLinear", "weight")},
    "int8": {("DynamicQuantizeMatMul", "product"), ("DequantizeLinear", "weight")},
}
"""Functions of the file and what they give out."""


@pytest.mark.parametrize("activations", FUSED)
def test_what_onnxruntime_fuses_is_one_node_too(activations, path):
    """A product of integers is one call with its activation: a standard DequantizeLinear of the weight in front of a MatMul is no way.

    onnxruntime (1.31) makes a Gemm of MatMul and Add before it looks for integers, and dequantizes activation and weight at every run.
    """
    inputs = (torch.randn(32, 512), IMAGES)
    result = export_onnx(Both().eval(), inputs, path, activations=activations, calibration=[inputs] if activations == "int8" else None)
    assert FUSED[activations].items() <= result.operators.items()
    assert not {"Cast", "Mul", "Sub", "Gather"} & result.operators.keys()
    file = onnx.load(path)
    graph = file.graph
    assert {(each.name.rstrip("0123456789"), *each.output) for each in file.functions} == BODIES[activations]
    kinds = {"float": "DequantizeLinear"}.get(activations, "DynamicQuantizeMatMul")
    readers = {name: [node for node in graph.node if name in node.input] for record in result.weights for name in record.initializers}
    assert all(len(nodes) == 1 for nodes in readers.values())
    assert all(nodes[0].op_type.startswith("DequantizeLinear" if name.startswith("filters") else kinds) for name, nodes in readers.items())
    assert {node.op_type.rstrip("0123456789") for node in nodes_of_weights(graph)} == {"DequantizeLinear"}


def test_slices_of_one_weight_are_a_node_each(path):
    attention = Swapped(nn.MultiheadAttention(384, 6, batch_first=True), 8, need_weights=False).eval()
    result = export_onnx(attention, tuple(torch.randn(2, 32, 384) for _ in range(3)), path, activations="dynamic")
    calls = [node for node in onnx.load(path).graph.node if node.domain]
    weights = [*["in_proj_weight"] * 3, "out_proj.weight"]
    assert [list(node.input[1:]) for node in calls] == [
        [f"{name}.{part}" for part in ("levels", "scale", "zero_point")] for name in weights
    ]
    assert result.operators["DynamicQuantizeMatMul"] == 4


TABLES = {
    "whole": {"bits": 5},
    "parts": {"bits": None},
    "blocks": {"bits": 8, "group": 64, "ranges": 64},
    "wide": {"bits": 12, "grid": "symmetric"},
}


class Twice(nn.Module):
    """Lookups in one table."""

    def __init__(self, name, bits, **options):
        super().__init__()
        bits = torch.tensor([2, 4, 8])[torch.arange(2000) % 3][:, None] if bits is None else bits
        self.table = store(torch.randn(2000, 256), bits, name=name, **options)
        self.register_buffer("places", torch.arange(3 * 400).view(400, 3))  # a table of indices that the file holds in a smaller type

    def forward(self, ids):
        return F.embedding(ids, self.table()) + F.embedding(ids + 1, self.table()), F.embedding(self.places, self.table())


def test_picked_rows_are_one_node(path, tmp_path):
    """What is picked stays integers, once in memory for all lookups."""
    model, ids = Parallel(*(Twice(name, **options) for name, options in TABLES.items())).eval(), torch.randint(1999, (2, 3))
    result = export_onnx(model, ids, path)
    assert {record.rule for record in result.weights} == {"rows"}
    file = onnx.load(path)
    assert {node.op_type.rstrip("0123456789") for node in file.graph.node} == {"Add", "Cast", "DequantizeRows"}
    calls = [node for node in file.graph.node if node.domain]
    assert [node.name for node in calls[:2]] == ["whole.rows", "whole.rows_2"]
    assert list(calls[0].input[1:]) == ["whole.levels", "whole.scale", "whole.zero_point"]
    kept = [tensor.data_type for tensor in optimized(path, tmp_path).initializer if list(tensor.dims) == [2000, 256]]
    assert sorted(kept) == sorted([TensorProto.UINT8] * 3 + [TensorProto.INT16])
    assert_same(run_exact(path, ids), leaves(model(ids)))
    found = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: ids.numpy()})
    assert_same([torch.from_numpy(value) for value in found], leaves(model(ids)))


def test_the_plain_layout_has_the_standard_operator_alone(path):
    model = Parallel(convolutions(["affine", "symmetric", "mixed"]), convolutions(["affine"], F.conv_transpose2d, (16, 24, 3, 3), axis=1))
    export_onnx(model.eval(), IMAGES, path, layout="qdq")
    file = onnx.load(path)
    assert not file.functions
    assert not [entry for entry in file.opset_import if entry.domain]
    assert [node.op_type for node in file.graph.node].count("DequantizeLinear") == 4


def test_inspection_takes_a_call_for_one_operator(path):
    export_onnx(convolutions(), IMAGES, path)
    found = {tensor.name: tensor for tensor in inspect_onnx(path).tensors}
    assert found["affine.levels"].readers == ("DequantizeLinear > Conv",)
    assert found["affine.levels"].learned_bits == {4: 24 * 144}
    assert (found["affine.levels"].scale_bytes, found["affine.levels"].zero_point_bytes) == (24 * 4, 24 // 2)
    assert (found["affine.scale"].role, found["affine.scale"].readers) == ("scale", ("DequantizeLinear",))
    assert found["affine.zero_point"].role == "zero_point"
    parts = [tensor for name, tensor in found.items() if name.startswith("mixed.levels")]
    assert len(parts) > 1
    assert {part.role for part in parts} == {"quantized"}
    assert sum(sum(part.learned_bits.values()) for part in parts) == 24 * 144
    assert read_metadata(path).weights[0].initializers == ("affine.levels",)


def test_the_rows_of_a_table_are_seen_through_a_call(path):
    export_onnx(Tied(100, 64, 4).eval(), torch.arange(6)[None], path)
    assert onnx.load(path).functions
    assert index_bounds([onnx.load(path)]) == {"ids": 100}


def test_calls_read_data_outside_of_the_file(path, monkeypatch):
    monkeypatch.setattr(saving, "_PROTOBUF_LIMIT", 1000)
    model = convolutions(["affine", "mixed"])
    export_onnx(model, IMAGES, path)
    assert path.with_name("model.onnx.data").is_file()
    assert onnx.load(path, load_external_data=False).functions
    assert_same(run_exact(path, IMAGES), model(IMAGES))


@pytest.mark.parametrize("layout", ["qdq", "onnxruntime"])
def test_openvino_reads_both_layouts(layout, path):
    """OpenVINO (2026.4) knows no functions of a model: those of the default layout are inlined first."""
    openvino = pytest.importorskip("openvino")
    model = Parallel(
        convolutions(["affine", "symmetric", "wide"]), convolutions(["affine"], F.conv_transpose2d, (16, 24, 3, 3), axis=1)
    ).eval()
    export_onnx(model, IMAGES, path, layout=layout)
    if layout == "onnxruntime":
        onnx.save(inliner.inline_local_functions(onnx.load(path)), path)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled([IMAGES.numpy()])
    for place, expected in enumerate(torch.utils._pytree.tree_leaves(model(IMAGES))):
        assert_same(torch.from_numpy(outputs[place]), expected)


def test_openvino_reads_products_in_the_plain_layout(path):
    openvino = pytest.importorskip("openvino")
    model = Tied(100, 64, 4).eval()
    ids = torch.arange(6)[None]
    export_onnx(model, ids, path, layout="qdq")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same(torch.from_numpy(compiled([ids.numpy()])[0]), model(ids))
