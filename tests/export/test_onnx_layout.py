"""The parts of the layout that decide: storage, cost, names of sizes; and graphs of a few nodes, laid out."""

import re
from dataclasses import replace
from itertools import product
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from stored_models import graph_of, store
from torch import nn
from torch.nn import functional as F

from diffq_fx.export.onnx.layout import profiles
from diffq_fx.export.onnx.layout.apply import apply_layout
from diffq_fx.export.onnx.layout.emitter import integer_tensor
from diffq_fx.export.onnx.layout.functions import call_functions
from diffq_fx.export.onnx.layout.request import LayoutRequest
from diffq_fx.export.onnx.layout.table import Storage, one_container, read_table, split_by_width
from diffq_fx.export.onnx.naming import name_sizes
from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.weights import WeightSpec


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(1, 300), st.sampled_from(["affine", "symmetric"]))
def test_parts_joined_in_order_are_the_weight(bits, columns, grid):
    weight = torch.linspace(-1, 2, len(bits) * columns).reshape(len(bits), columns)
    table = read_table(store(weight, torch.tensor(bits)[:, None], grid=grid))
    storage = split_by_width(table, "weight")
    joined = np.concatenate([storage.levels(rows) for rows in storage.parts.values()])
    assert np.array_equal(joined[np.argsort(np.argsort(storage.part_of_row, kind="stable"))], table.levels)
    assert all((storage.widths >= table.widths).tolist())
    assert storage.file_bytes <= one_container(table, "weight").file_bytes
    if grid == "affine":
        largest = 2 ** storage.widths.astype(np.int64) - 1
        assert ((table.levels >= 0) & (table.levels <= largest[:, None])).all()
    else:
        half = 2 ** (storage.widths.astype(np.int64) - 1)
        assert ((table.levels >= -half[:, None]) & (table.levels < half[:, None])).all()


def test_split_takes_the_smallest_of_all_storages():
    bits = torch.tensor([2, 4, 8, 16])[torch.randint(4, (300, 1))]
    table = read_table(store(torch.randn(300, 64), bits))
    found = split_by_width(table, "weight").file_bytes
    choices = []
    for narrower in product([False, True], repeat=3):
        offered = np.array([width for width, is_in in zip((2, 4, 8), narrower, strict=True) if is_in] + [16])
        choices.append(Storage(table, "weight", offered[np.searchsorted(offered, table.widths)]).file_bytes)
    assert found == min(choices)


@pytest.mark.parametrize(("form", "shape"), [("weight", (6, 10)), ("transposed", (10, 6)), ("rows", (6, 10))])
def test_forms(form, shape):
    table = read_table(store(torch.randn(6, 10), 4))
    storage = one_container(table, form)
    assert storage.shape == storage.levels().shape == shape
    scales = storage.groups(table.scale)
    assert scales.shape == ((1, 6) if form == "transposed" else (6, 1))
    assert storage.levels(np.array([1, 4])).shape[storage.axis] == 2


def laid_out(signature, nodes, weight, settings=MappingProxyType({}), **numbers):
    """A graph of a few nodes, in which ``diffq_fx.Weight (w)`` stands for the weight, laid out; its record; what it gives for an x."""
    given = "".join(f", float[{len(array)}] {name}" for name, array in numbers.items())
    shaped = ", ".join(f"float{list(weight.spec.shape)} {name}" for name in re.findall(r"(\w+) = diffq_fx\.Weight", nodes))
    graph = graph_of(signature.replace(") =>", f"{given}, uint8[1] w) =>") + f" <{shaped}>", nodes)
    for name, array in numbers.items():
        value = next(value for value in graph.inputs if value.name == name)
        graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        graph.register_initializer(value)
    model = ir.Model(graph, ir_version=10)
    request = LayoutRequest(machines=lambda *_: profiles.KINDS["portable"], **settings)
    (record,) = apply_layout(model, {"w": weight}, request).records
    call_functions(model)
    graph.inputs.pop()  # the weight of the placeholders
    for function in model.functions.values():
        assert [value.name for value in function.outputs] == ["product" if "MatMul" in function.name else "weight"]
    read = {value.name: value for node in graph for value in node.inputs if value is not None and (node.domain or ".levels" in value.name)}
    assert set(record.initializers) <= read.keys(), "the numbers of a weight are the file's, not a function's"
    assert not any(name.startswith("sizes") or name.endswith(".offset") for name in read), "what does not depend on them is a function's"
    return [node.op_type for node in graph], record, lambda x: ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x.numpy()})


@pytest.mark.parametrize("bits", [4, 12, torch.tensor([[2], [8], [4]]), "codes", "codes of int8"])
def test_all_readers_of_a_weight_read_one(bits):
    if isinstance(bits, str):
        codebook = (
            (torch.randn(3, 2), None)
            if bits == "codes"
            else (torch.tensor([[3, -90], [7, 5], [-1, 100]], dtype=torch.int8), torch.tensor(0.1))
        )
        weight = CodebookWeight(WeightSpec(name="m", shape=(3, 5), axis=0), torch.arange(9).view(3, 3) % 3, *codebook)
    else:
        weight = store(torch.randn(3, 5), bits, name="m")
    nodes = "a = diffq_fx.Weight (w) y = Add (x, a) b = diffq_fx.Weight (w) z = Neg (b) u = diffq_fx.Weight (w)"
    weight.spec = replace(weight.spec, aliases=("tied",))
    ops, record, run = laid_out("(float[3, 5] x) => (float[3, 5] y, float[3, 5] z, float[3, 5] u)", nodes, weight)
    assert record.rule == ("codebook" if isinstance(bits, str) else "fold")
    assert record.aliases == ("tied",)
    assert ops == ["DequantizeLinear", "Add", "Neg"]
    x, known = torch.randn(3, 5), weight()
    for found, expected in zip(run(x), (x + known, -known, known), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("reader", ["Slice", "Split"])
@pytest.mark.parametrize(("activations", "kernel"), [("float", "linear"), ("dynamic", "dynamic")])
@pytest.mark.parametrize("ranges", ["channel", "tensor"])
def test_products_of_parts_of_a_weight_leave_nothing_of_it_in_float(reader, activations, kernel, ranges):
    weight = store(torch.randn(1024, 512), 7, group=ranges, ranges=ranges)
    bounds = "i = Constant <value = int64[1] {0}> () j = Constant <value = int64[1] {512}> () k = Constant <value = int64[1] {1024}> () "
    cut = {"Slice": bounds + "s = Slice (a, i, j) t = Slice (a, j, k)", "Split": "s, t = Split <axis = 0, num_outputs = 2> (a)"}[reader]
    nodes = f"a = diffq_fx.Weight (w) {cut} u = Transpose (s) y = MatMul (x, u) v = Transpose (t) z = MatMul (x, v)"
    ops, record, run = laid_out("(float[32, 512] x) => (float[32, 512] y, float[32, 512] z)", nodes, weight, {"activations": activations})
    assert record.rule == kernel
    kinds = ["DequantizeLinear", "MatMul"] if kernel == "linear" else ["DynamicQuantizeMatMul"]
    assert sorted(op.rstrip("0123456789") for op in ops if op != "Constant") == sorted(2 * kinds)
    x = torch.randn(32, 512)
    for found, expected in zip(run(x), (x @ weight().T).split(512, 1), strict=True):
        assert np.abs(found - expected.numpy()).max() < (0.02 if kernel == "dynamic" else 1e-4) * expected.abs().max()


MIXED = torch.tensor([2, 4, 8])[torch.arange(512) % 3][:, None]
FUSED = {
    "4 bits": {"bits": 4},
    "one scale": {"bits": 8, "group": "tensor", "ranges": "tensor"},
    "blocks": {"bits": 4, "group": 96, "ranges": 96, "grid": "symmetric"},
    "mixed": {"bits": MIXED},
    "halves": {"bits": 2, "grid": "half"},
    "halves of blocks": {"bits": 2, "grid": "half", "group": 64, "ranges": 64},
    "halves of short blocks": {"bits": 2, "grid": "half", "group": 96, "ranges": 96},
    "halves of mixed": {"bits": torch.where(MIXED == 4, 1, MIXED), "grid": "half"},
}
CORRECTED = {"halves", "halves of blocks"}
"""Zero points are rounded down, and what that adds is subtracted."""


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
def test_a_linear_layer_computes_what_the_model_does(case, layout):
    weight, bias = store(torch.randn(512, 1024), **FUSED[case]), torch.randn(512)
    nodes = "a = diffq_fx.Weight (w) y = Gemm <transB = 1> (x, a, b)"
    ops, record, run = laid_out("(float[1, 1024] x) => (float[1, 512] y)", nodes, weight, {"layout": layout}, b=bias.numpy())
    assert (record.rule, record.reason) == ("linear" if layout == "onnxruntime" else "qdq", None)
    assert ("ReduceSum" in ops) is (layout == "onnxruntime" and case in CORRECTED)
    x = torch.randn(1, 1024)
    expected = F.linear(x, weight(), bias)
    assert np.abs(run(x)[0] - expected.numpy()).max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
def test_two_products_of_a_weight_as_it_lies(layout):
    weight = store(torch.randn(512, 1024), 4, axis=1)
    nodes = "a = diffq_fx.Weight (w) y = MatMul (x, a) b = diffq_fx.Weight (w) z = MatMul (x, b)"
    outputs = "(float[1, 1024] y, float[1, 1024] z)"
    ops, record, run = laid_out(f"(float[1, 512] x) => {outputs}", nodes, weight, {"layout": layout})
    assert ops.count("MatMul") == 2
    assert (record.rule, record.reason) == ("linear" if layout == "onnxruntime" else "qdq", None)
    x = torch.randn(1, 512)
    for found in run(x):
        np.testing.assert_allclose(found, x @ weight(), rtol=1e-4, atol=1e-4)


TABLES = {
    "channels": {"bits": 4},
    "one scale": {"bits": 8, "group": "tensor", "ranges": "tensor"},
    "blocks": {"bits": 4, "group": 48, "ranges": 48},
    "halves": {"bits": torch.tensor([1, 2, 5])[torch.arange(2000) % 3][:, None], "grid": "half"},
}


@pytest.mark.parametrize("case", TABLES)
def test_rows_of_a_table_are_picked_as_integers(case):
    weight = store(torch.randn(2000, 200), **TABLES[case])
    nodes = "a = diffq_fx.Weight (w) y = Gather <axis = 0> (a, x)"
    ops, record, run = laid_out("(int64[3, 2] x) => (float[3, 2, 200] y)", nodes, weight)
    assert (record.rule, record.reason, ops) == ("rows", None, ["DequantizeRows"])
    ids = torch.randint(2000, (3, 2))
    np.testing.assert_allclose(run(ids)[0], F.embedding(ids, weight()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("activations", "rule"), [("float", "linear+rows"), ("dynamic", "dynamic+rows")])
def test_a_table_that_is_the_head_too(activations, rule):
    weight = store(torch.randn(2048, 256), 4)
    nodes = "a = diffq_fx.Weight (w) e = Gather (a, x) b = diffq_fx.Weight (w) t = Transpose (b) y = MatMul (e, t)"
    _, record, run = laid_out("(int64[1, 8] x) => (float[1, 8, 2048] y)", nodes, weight, {"activations": activations})
    assert (record.rule, record.reason) == (rule, None)
    ids = torch.randint(2048, (1, 8))
    expected = F.embedding(ids, weight()) @ weight().T
    assert np.abs(run(ids)[0] - expected.numpy()).max() < (0.02 if activations == "dynamic" else 1e-4) * expected.abs().max()


@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
def test_a_transposed_convolution_reads_a_float_weight_and_says_why(layout):
    weight = store(torch.randn(4, 6, 3), 4, axis=1)
    nodes = "a = diffq_fx.Weight (w) y = ConvTranspose (x, a)"
    ops, record, run = laid_out("(float[1, 4, 9] x) => (float[1, 6, 11] y)", nodes, weight, {"layout": layout})
    assert ops == ["DequantizeLinear", "ConvTranspose"]
    if layout == "qdq":
        assert (record.rule, record.reason) == ("qdq", None)
    else:
        assert record.rule == "fold"
        assert record.reason.startswith("read by ConvTranspose")
        assert record.reason.endswith("no integer kernel for ConvTranspose")
    x = torch.randn(1, 4, 9)
    np.testing.assert_allclose(run(x)[0], F.conv_transpose1d(x, weight()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("group", "is_folded"), [("channel", True), (6, False)])
def test_a_batch_norm_behind_a_weight_without_blocks_is_folded(group, is_folded):
    weight = store(torch.randn(8, 4, 3), 4, group=group, ranges=group)
    norm = nn.BatchNorm1d(8).eval()
    norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var = torch.rand(4, 8).add(0.5).unbind()
    numbers = {"g": norm.weight.data, "b": norm.bias.data, "m": norm.running_mean, "v": norm.running_var}
    nodes = "a = diffq_fx.Weight (w) c = Conv (x, a) y = BatchNormalization (c, g, b, m, v)"
    arrays = {name: value.numpy() for name, value in numbers.items()}
    ops, record, run = laid_out("(float[1, 4, 9] x) => (float[1, 8, 7] y)", nodes, weight, **arrays)
    assert ("BatchNormalization" not in ops) is is_folded
    assert record.reason.startswith("read by Conv,")
    x = torch.randn(1, 4, 9)
    with torch.no_grad():
        np.testing.assert_allclose(run(x)[0], norm(F.conv1d(x, weight())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_integer_tensors_hold_both_ends(bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    levels = np.array([[low, high, 0], [high, low, high]])
    tensor = integer_tensor(levels, bits, signed=signed)
    proto = ir.to_proto(tensor)
    assert proto.raw_data
    assert np.array_equal(ir.from_proto(proto).numpy().astype(int), levels)


def test_names_of_sizes():
    x = ir.val("x", ir.DataType.FLOAT, ["s17", "s3", 8])
    y = ir.val("y", ir.DataType.FLOAT, ["s17", "4", "s9"])
    node = ir.node("Concat", [x, y], {"axis": 0})
    node.outputs[0].shape = ir.Shape(["2*s17", "s3 + s9", "s99"])
    graph = ir.Graph([x, y], node.outputs, nodes=[node], name="graph")
    name_sizes(graph)
    assert [str(value.shape) for value in (x, y, node.outputs[0])] == ["[batch,x_1,8]", "[batch,4,y_2]", "[2*batch,x_1 + y_2,s99]"]
