"""No integer product of an exported file saturates, on whatever processor it will run: shown with models of their arithmetic."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from saturating import MACHINES, arm_without_dot, columns, exact, filters, run_on, x86_without_vnni
from stored_models import Conv, Linear, Parallel, Swapped, store
from torch import nn
from torch.nn import functional as F

from diffq_fx.errors import ExportError
from diffq_fx.export import export_onnx, read_metadata
from diffq_fx.export.onnx.inspection import inspect_onnx
from diffq_fx.export.onnx.integer_products import check_products, find_products
from diffq_fx.export.onnx.layout import products
from diffq_fx.export.onnx.layout.products import EXACT_LEVEL, MAX_INPUTS, choose_form, is_exact
from diffq_fx.export.onnx.layout.table import read_table

pytestmark = pytest.mark.filterwarnings("ignore:export_onnx. rounding activations changes")

BITS, GRIDS = range(2, 9), ("affine", "symmetric")


def matmul_integer(activation, levels):
    """What onnxruntime computes here."""
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [None, None])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(levels, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": activation})[0]


RNG = np.random.default_rng(0)
ACTIVATIONS = [RNG.integers(0, 256, (6, 99)), np.full((2, 99), 255), np.zeros((1, 99)), RNG.choice([0, 255], (5, 99))]
ACTIVATION = np.concatenate(ACTIVATIONS).astype(np.uint8)


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(-64, 64, np.int8), (-65, 65, np.int8), (-128, -65, np.int8), (-128, 127, np.int8), (0, 255, np.uint8)]
)
def test_levels_that_are_exact_are_so_on_every_machine_and_others_are_not(low, high, dtype):
    levels = np.concatenate([np.full((99, 3), low), np.full((99, 3), high), RNG.choice([low, high], (99, 10))], 1).astype(dtype)
    right = exact(ACTIVATION, levels)
    assert is_exact(levels) == all(np.array_equal(machine(ACTIVATION, levels), right) for machine in (x86_without_vnni, arm_without_dot))
    found = matmul_integer(ACTIVATION, levels)
    known = [np.array_equal(found, machine(ACTIVATION, levels)) for machine in (exact, *MACHINES)]
    assert any(known), "the models of arithmetic describe this processor"
    assert known[0] or not is_exact(levels)


@pytest.mark.parametrize("grid", GRIDS)
def test_dynamic_products_are_right_on_every_machine(grid, path):
    layers = [Linear(384, 512, bits, grid=grid, name=f"w{bits}") for bits in BITS]
    layers.append(Linear(384, 512, torch.tensor([2, 3, 5, 8])[torch.randint(4, (512, 1))], grid=grid, name="mixed"))
    layers.append(Linear(384, 512, 7, group="tensor", ranges="tensor", grid=grid, name="tensor"))
    model = Parallel(*layers).eval()
    result = export_onnx(model, torch.randn(8, 384), path, activations="dynamic")
    assert {record.rule for record in result.weights} == {"dynamic"}
    types = {record.name: record.products for record in result.weights}
    assert types == {layer.weight.spec.name: ("uint8",) if layer.weight.spec.name in ("w8", "mixed") else ("int8",) for layer in layers}
    fresh = torch.randn(5, 384)
    for machine in MACHINES:
        for found, expected in zip(run_on(machine, path, fresh), model(fresh), strict=True):
            assert (found - expected).abs().max() < 0.015 * expected.abs().max()
    assert len(find_products(path)) == len(layers)


CONVOLUTIONS = {
    "few inputs": (24, 16, 3, 3, 1),
    "many inputs": (24, 32, 3, 3, 1),
    "groups": (64, 32, 3, 3, 2),
    "depthwise": (32, 1, 3, 3, 32),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_exact_on_every_machine(kind, grid, path):
    *shape, groups = CONVOLUTIONS[kind]
    images = torch.randn(2, shape[1] * groups, 6, 6)
    layers = [Conv(lambda x, w: F.conv2d(x, w, groups=groups), shape, bits, grid=grid, name=f"w{bits}") for bits in BITS]
    result = export_onnx(Parallel(*layers).eval(), images, path, activations="int8", calibration=[images])
    assert [record.rule for record in result.weights] == ["int8"] * len(layers)
    found = find_products(path)
    assert [product.operator for product in found] == ["Conv"] * len(layers)
    rounded = torch.from_numpy(RNG.choice([0, 1, 254, 255], images.shape))
    for product, record in zip(found, result.weights, strict=True):
        assert record.products == (str(product.levels.dtype),)
        levels = product.levels[: shape[0] // groups]  # of the first group
        for channels_last in (False, True):
            activation = columns(rounded[:, : shape[1]], shape[2:], channels_last=channels_last)
            matrix = filters(levels, channels_last=channels_last)
            for machine in MACHINES:
                assert np.array_equal(machine(activation, matrix), exact(activation, matrix)), record.name


def test_attention_and_its_slices_are_proven(path):
    attention = Swapped(nn.MultiheadAttention(384, 6, batch_first=True), 8, need_weights=False).eval()
    export_onnx(attention, tuple(torch.randn(2, 32, 384) for _ in range(3)), path, activations="dynamic")
    found = find_products(path)
    assert [product.levels.shape for product in found] == [(384, 384)] * 4
    assert {product.levels.dtype for product in found} == {np.dtype(np.uint8)}


def test_the_record_says_what_is_multiplied_and_why(path):
    model = Parallel(Linear(384, 512, 7, name="seven"), Linear(384, 512, 8, name="eight"), Linear(384, 8, 8, name="small")).eval()
    export_onnx(model, torch.randn(32, 384), path, activations="dynamic")
    seven, eight, small = read_metadata(path).weights
    assert (seven.products, seven.remarks) == (("int8",), ())
    assert eight.products == ("uint8",)
    assert "saturate on x86 without VNNI" in eight.remarks[0]
    assert small.products == ()
    assert inspect_onnx(path).metadata.weights[1].products == ("uint8",)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("zero_points", ["any", "equal", "moved"])
def test_forms_fit_their_types_and_are_what_the_kernel_wants(grid, zero_points):
    for bits in BITS:
        for ranges in ("channel", "tensor"):
            table = read_table(store(torch.randn(40, 50), bits, grid=grid, group=ranges, ranges=ranges))
            form = choose_form(table, zero_points)
            learned = 0 if table.zero_point is None else table.zero_point
            levels = table.levels - (learned if form.centred else 0) - form.offset
            moved = np.broadcast_to((0 if form.centred else learned) - form.offset, table.scale.shape)
            if not (zero_points == "equal" and bits > 6 and grid == "affine"):  # those are rounded anew
                assert np.array_equal(levels.astype(form.dtype.numpy()), levels)
            assert np.array_equal(moved.astype(form.dtype.numpy()), moved)
            assert is_exact(levels.astype(form.dtype.numpy()))
            assert zero_points != "equal" or (moved == moved[0]).all()
            assert zero_points != "moved" or moved.any()
            assert bits == 8 or zero_points == "equal" or form.dtype.name == "INT8"


class Products(nn.Module):
    """Products of two activations between integer convolutions: the scores of attention, the gate of a network that makes a weight."""

    def __init__(self, bits):
        super().__init__()
        self.convolutions = nn.ModuleList(Conv(F.conv2d, (32, 32, 1, 1), bits, name=f"w{place}") for place in range(4))

    def forward(self, x):
        query, key, value = (convolve(x) for convolve in self.convolutions[:3])
        scores = query.flatten(2).transpose(1, 2) @ key.flatten(2)
        mixed = (value.flatten(2) @ scores).reshape(x.shape)
        return self.convolutions[3](mixed), F.conv2d(value, key[:1].reshape(64, 32, 1, 1))


@pytest.mark.parametrize("bits", [5, 8])
def test_products_of_two_activations_stay_in_float(bits, path):
    x = torch.randn(2, 32, 8, 8)
    result = export_onnx(Products(bits).eval(), x, path, activations="int8", calibration=[x])
    assert {record.rule for record in result.weights} == {"int8"}
    assert {product.operator for product in find_products(path)} == {"Conv"}
    assert len(find_products(path)) == 4
    assert result.fast_relative_error < 0.1


def full_of(convolve, shape):
    """Weights whose levels are all far above their zero points: the largest sums that there are."""
    layer = Conv(convolve, shape, 8)
    layer.weight = store(0.98 + 0.02 * torch.rand(shape), 8)
    return layer.eval()


@pytest.mark.parametrize("inputs", [MAX_INPUTS, 40_000])
def test_sums_of_dynamic_products_fit_int32(inputs, path):
    model, x = full_of(F.linear, (48, inputs)), torch.ones(4, inputs)
    rule = export_onnx(model, x, path, activations="dynamic").weights[0].rule
    assert ("dynamic" in rule) == (inputs <= MAX_INPUTS)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(found / model(x).detach().numpy() - 1).max() < 0.02


def test_sums_of_convolutions_fit_int32(path):
    model, x = full_of(F.conv2d, (8, 4500, 3, 3)), torch.ones(1, 4500, 3, 3)
    (record,) = export_onnx(model, x, path, activations="int8", calibration=[x]).weights
    assert record.rule == "fold"
    assert "40500 inputs of a filter: int32 holds the sum of 33025" in record.reason


@pytest.mark.parametrize("kind", ["MatMulInteger", "Gemm, reshaped", "MatMul"])
def test_sums_that_could_overflow_are_found(kind, path, monkeypatch):
    monkeypatch.setattr(f"{check_products.__module__}.MAX_INPUTS", 3)
    x = helper.make_tensor_value_info("xq", TensorProto.UINT8, [4, 4])
    onnx.save(helper.make_model(graph_of(NODES[kind], [x]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(ExportError, match="adds up 4 inputs: int32 holds the sum of 3"):
        check_products(path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("activations", ["dynamic", "int8"])
def test_a_product_that_could_saturate_is_not_written(activations, verify, path, monkeypatch):
    """Whatever may one day emit it: the proof reads the file."""
    monkeypatch.setattr(products, "_fit", lambda levels: bool(np.abs(levels).max() <= 127))
    path.write_bytes(b"old")
    model = Linear(384, 512, 7) if activations == "dynamic" else Conv(F.conv2d, (24, 16, 3, 3), 7)
    x = torch.randn(32, 384) if activations == "dynamic" else torch.randn(1, 16, 8, 8)
    monkeypatch.setattr(f"{check_products.__module__}.is_exact", lambda levels: np.abs(levels.astype(int)).max() <= EXACT_LEVEL)
    calibration = [x] if activations == "int8" else None
    with pytest.raises(ExportError, match=r"multiplies int8 levels from -\d+ to \d+: beyond \+-64 they saturate"):
        export_onnx(model.eval(), x, path, activations=activations, calibration=calibration, verify=verify)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


UNSAFE = np.full((4, 4), 100, np.int8)
NUMBERS = {
    "s": np.float32(0.1),
    "z": np.uint8(3),
    "wz": np.int8(0),
    "w": UNSAFE,
    "half": (UNSAFE // 2).astype(np.int8),
    "b": np.zeros(4, np.float32),
}
NODES = {
    "MatMulInteger": [("MatMulInteger", ["xq", "w"], "y")],
    "QLinearMatMul": [("QLinearMatMul", ["xq", "s", "z", "w", "s", "wz", "s", "z"], "y")],
    "sum of constants": [("Add", ["half", "half"], "two"), ("MatMulInteger", ["xq", "two"], "y")],
    "MatMul": [("DequantizeLinear", ["xq", "s", "z"], "xf"), ("DequantizeLinear", ["w", "s"], "wf"), ("MatMul", ["xf", "wf"], "y")],
    "Gemm, reshaped": [
        ("DequantizeLinear", ["xq", "s", "z"], "xf"),
        ("Flatten", ["xf"], "xr"),
        ("DequantizeLinear", ["w", "s"], "wf"),
        ("Transpose", ["wf"], "wt"),
        ("Gemm", ["xr", "wt", "b"], "y"),
    ],
    "computed weight": [("MatMulInteger", ["xq", "xq"], "y")],
}


def graph_of(nodes, inputs, *, external=None):
    made = [helper.make_node(op_type, names, [output]) for op_type, names, output in nodes]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in NUMBERS.items()]
    return helper.make_graph(made, "g", inputs, [helper.make_tensor_value_info("y", 0, None)], tensors)


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("place", ["graph", "body", "external"])
def test_unsafe_products_of_any_kind_are_found(kind, place, path):
    x = helper.make_tensor_value_info("xq", TensorProto.UINT8, [4, 4])
    graph = graph_of(NODES[kind], [x])
    if place == "body":
        flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
        branch = graph_of(NODES[kind], [])
        node = helper.make_node("If", ["flag"], ["z_out"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([node], "outer", [x, flag], [helper.make_tensor_value_info("z_out", 0, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=place == "external", size_threshold=0, location="model.data")
    with pytest.raises(ExportError, match="may saturate|levels from"):
        check_products(path)


def test_products_with_float_activations_are_none_of_our_business(path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])
    nodes = [("DequantizeLinear", ["w", "s"], "wf"), ("MatMul", ["x", "wf"], "y")]
    onnx.save(helper.make_model(graph_of(nodes, [x]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    assert find_products(path) == []


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("has_zero_points", [False, True])
def test_fused_products_are_exact_for_any_levels(bits, has_zero_points):
    """onnxruntime's MatMulNBits rounds activations to int8, block by block: their products do not saturate, whatever the levels are."""
    inputs, outputs, top = 512, 48, 2**bits - 1
    for block in (16, 32, 64, 128, 256):
        blocks = inputs // block
        levels = RNG.choice([0, top], (outputs, inputs))
        levels[:8], levels[8:16] = top, 0
        zero_points = RNG.integers(0, top + 1, (outputs, blocks)) if has_zero_points else np.full((outputs, blocks), 2 ** (bits - 1))
        constants = {"w": packed(levels, bits).reshape(outputs, blocks, -1), "s": np.ones((outputs, blocks), np.float32)}
        constants |= {"z": packed(zero_points, bits)} if has_zero_points else {}
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **attributes)
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
        graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(value, name) for name, value in constants.items()])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        weight = levels - np.repeat(zero_points, block, 1)
        for rows in (1, 3, 8):
            activation = np.concatenate([np.full((1, inputs), 127), np.full((1, inputs), -127), RNG.choice([-127, 127], (rows, inputs))])
            for part in np.array_split(activation.astype(np.float32), 3 if rows == 1 else 1):
                expected = part @ weight.T.astype(np.float64)
                assert np.abs(session.run(None, {"x": part})[0] - expected).max() <= 1e-5 * np.abs(expected).max()


def packed(values, bits):
    """Small numbers in bytes, the first in the low bits."""
    per_byte = 8 // bits
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte))).reshape(len(values), -1, per_byte)
    return np.bitwise_or.reduce(values << (np.arange(per_byte) * bits), axis=2).astype(np.uint8)
