"""activations="dynamic" and "int8": what onnxruntime makes of the file, and how far its outputs are from PyTorch's."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from stored_models import Bare, Conv, Linear, Parallel, Swapped, Tied, assert_same, levels_in, store
from torch import nn
from torch.nn import functional as F

from diffq_fx import DiffQConfig, convert_diffq, prepare_diffq
from diffq_fx.errors import ExportError
from diffq_fx.export import export_onnx, read_metadata, session_options
from diffq_fx.export.onnx.layout import products

pytestmark = pytest.mark.filterwarnings("ignore:convert. the bits never moved", "ignore:export_onnx. rounding activations changes")

ROWS = torch.randn(32, 384)
IMAGE = torch.randn(2, 16, 14, 14)


def run_optimized(path, *inputs):
    """The operators that are left of a file, and its outputs."""
    options = session_options(path)
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    ops = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return ops, [torch.from_numpy(output) for output in session.run(None, feeds)]


def int8_error(found, expected):
    return float((found - expected.detach()).abs().max() / expected.detach().abs().max())


WEIGHTS = [(bits, grid) for bits in (2, 3, 4, 5, 7, 8) for grid in ("affine", "symmetric")]


def test_dynamic_at_every_width_and_grid(path):
    layers = [Linear(384, 512, bits, grid=grid, name=f"w{i}") for i, (bits, grid) in enumerate(WEIGHTS)]
    layers.append(Linear(384, 512, torch.tensor([2, 3, 5, 8])[torch.randint(4, (512, 1))], name="mixed"))
    layers.append(Linear(384, 512, 8, group="tensor", ranges="tensor", name="tensor"))
    layers.append(Bare(384, 512, 4, name="bare"))
    for layer in layers[:2]:
        layer.bias = None
    model = Parallel(*layers).eval()
    result = export_onnx(model, ROWS, path, activations="dynamic")
    assert {record.rule for record in result.weights} == {"dynamic"}
    assert result.max_relative_error < 1e-5
    fresh = torch.randn(40, 384)
    ops, outputs = run_optimized(path, fresh)
    assert ops.count("MatMulIntegerToFloat") == len(layers)
    assert set(ops) == {"DynamicQuantizeLinear", "MatMulIntegerToFloat"}
    for found, expected in zip(outputs, model(fresh), strict=True):
        assert int8_error(found, expected) < 0.015  # a weight that is one step of 8 bits off everywhere gives 0.05 and more
    stored = levels_in(path)
    for record, (bits, grid) in zip(result.weights, WEIGHTS):  # noqa: B905
        container = {2: 2, 3: 4, 4: 4, 5: 8, 7: 8, 8: 8}[bits]
        assert stored[f"{record.name}.levels"][0] == f"{'INT' if grid == 'symmetric' else 'UINT'}{container}"


@pytest.mark.parametrize("shape", [(32, 384), (2, 16, 384)])
def test_one_dynamic_product_is_one_kernel(shape, path):
    model = Linear(384, 512, 8).eval()
    export_onnx(model, torch.zeros(shape), path, activations="dynamic")
    fresh = torch.randn(3, *shape[1:])
    ops, (found,) = run_optimized(path, fresh)
    assert ops == ["DynamicQuantizeMatMul"]
    assert int8_error(found, model(fresh)) < 0.015


@pytest.mark.parametrize(
    ("node", "number", "other"), [(1, 2, None), (1, 3, None), (4, 1, (0, 1))], ids=["input's zero point", "weight's", "scale"]
)
def test_a_file_that_computes_something_else_as_it_runs_is_refused(node, number, other, path, monkeypatch):
    """Its twin in float is right."""
    made = products._integer_nodes

    def broken(*args):
        nodes = made(*args)
        nodes[node].replace_input_with(number, other and nodes[other[0]].outputs[other[1]])
        return nodes

    monkeypatch.setattr(products, "_integer_nodes", broken)
    with pytest.raises(ExportError, match="as the file runs an output differs from PyTorch by .* but multiplied in float"):
        export_onnx(Linear(384, 512, 8).eval(), torch.zeros(32, 384), path, activations="dynamic")
    assert not path.exists()


def test_attention_reads_its_projections_apart(path):
    """MultiheadAttention slices one weight into those of query, key and value."""
    attention = Swapped(nn.MultiheadAttention(384, 6, batch_first=True), 5, need_weights=False).eval()
    result = export_onnx(attention, tuple(torch.randn(2, 32, 384) for _ in range(3)), path, activations="dynamic")
    assert result.operators["DynamicQuantizeMatMul"] == 4
    assert {record.rule for record in result.weights} == {"dynamic"}
    assert 0 < result.fast_relative_error < 0.05


def test_dynamic_leaves_small_and_blocked_layers_alone(path):
    model = Parallel(Linear(384, 8, 4, name="small"), Linear(384, 512, 4, group=32, ranges=32, name="blocks")).eval()
    small, blocks = export_onnx(model, ROWS, path, activations="dynamic").weights
    assert small.rule == "fold"
    assert "predicted" in small.reason
    assert blocks.rule in ("linear", "fold")


class Net(nn.Module):
    """Everything that has an int8 kernel, and some things that have none."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.expand, self.gate, self.leak = (nn.Conv2d(32, 32, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)
        self.up = nn.ConvTranspose2d(64, 16, 2, 2)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)  # negative factors too
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        with torch.no_grad():
            self.norm.weight[3] = 0

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.depthwise(x))
        x = F.silu(self.norm(self.expand(x))) * torch.sigmoid(self.gate(x))
        x = torch.cat([x, F.leaky_relu(self.leak(x))], 1)
        return self.head(self.pool(x).flatten(1)), self.up(F.avg_pool2d(x, 2))


def converted(model, example, **config):
    prepared = prepare_diffq(model.eval(), example, DiffQConfig(target_bits=None, **{"init_bits": 5, "min_size": 0, **config}))
    return convert_diffq(prepared)


def test_int8_network(path):
    images = [torch.randn(4, 16, 14, 14) for _ in range(4)]
    model = converted(Net(), IMAGE)
    result = export_onnx(model, IMAGE, path, activations="int8", calibration=images)
    assert result.max_relative_error < 1e-5, "the BatchNorms are in the weights, nothing else has changed"
    rules = {record.name: record.rule for record in result.weights}
    assert rules.pop("up.weight") == "fold"
    assert rules.pop("head.weight") == "fold"
    assert set(rules.values()) == {"int8"}
    ops, outputs = run_optimized(path, images[0])
    assert ops.count("QLinearConv") == 5
    assert {"QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearConcat", "QLinearLeakyRelu", "QLinearAveragePool", "NhwcMaxPool"} <= set(
        ops
    )
    assert not {"Conv", "Relu", "Clip", "BatchNormalization", "Sigmoid"} & set(ops)
    for found, expected in zip(outputs, model(images[0]), strict=True):
        assert int8_error(found, expected) < 0.05
    assert read_metadata(path).activations == "int8"


@pytest.mark.parametrize(("bits", "grid"), WEIGHTS)
def test_one_int8_convolution(bits, grid, path):
    model = Conv(lambda x, w: F.relu(F.conv2d(x, w, padding=1)), (24, 16, 3, 3), bits, grid=grid).eval()
    export_onnx(model, IMAGE, path, activations="int8", calibration=[IMAGE])
    ops, (found,) = run_optimized(path, IMAGE)
    assert ops.count("QLinearConv") == 1
    assert "Conv" not in ops
    assert int8_error(found, model(IMAGE)) < 0.015


@pytest.mark.parametrize("dimensions", [1, 3])
def test_int8_convolutions_of_other_ranks(dimensions, path):
    function = {1: F.conv1d, 3: F.conv3d}[dimensions]
    model = Conv(function, (8, 4, *[3] * dimensions), 4).eval()
    x = torch.randn(2, 4, *[9] * dimensions)
    result = export_onnx(model, x, path, activations="int8", calibration=[x])
    assert result.weights[0].rule == "int8"
    _, (found,) = run_optimized(path, x)
    assert int8_error(found, model(x)) < 0.015


@pytest.mark.parametrize(
    ("bits", "grid", "is_exact"), [(4, "affine", True), (7, "affine", True), (8, "affine", False), (8, "symmetric", True)]
)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_depthwise_convolutions_have_one_zero_point(bits, grid, is_exact, dimensions, path):
    """onnxruntime's fast depthwise kernel has one zero point for all channels; another takes twenty times as long."""
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
    x = torch.randn(2, 32, *[7] * dimensions)
    model = Conv(lambda x, w: convolve(x, w, groups=32), (32, 1, *[3] * dimensions), bits, grid=grid).eval()
    result = export_onnx(model, x, path, activations="int8", calibration=[x])
    assert result.max_relative_error < 1e-5, "rounding anew is no part of the comparison without rounded activations"
    (record,) = result.weights
    assert (record.rule, record.reason) == ("int8", None)
    assert any("rounded anew" in remark for remark in record.remarks) != is_exact
    ops, (found,) = run_optimized(path, x)
    assert ops.count("QLinearConv") == 1
    assert "Conv" not in ops
    weight, steps, zero_points = _int8_filters(path)
    assert (zero_points == zero_points[0]).all()
    error = np.abs(weight - model.weight().detach().numpy())
    assert (error <= (1e-6 if is_exact else 0.5 + 1e-5) * steps).all()
    assert is_exact or error.max() > 0.2 * steps.min(), "no channel of this test is uneven"
    assert int8_error(found, model(x)) < 0.02
    assert levels_in(path)["weight.levels"][0].endswith("4" if bits == 4 else "8"), "the learned levels are in the file"


@pytest.mark.parametrize(("channels", "is_deep"), [(16, False), (28, False), (32, True)])
@pytest.mark.parametrize(("bits", "grid"), [(4, "affine"), (8, "affine"), (4, "symmetric"), (8, "symmetric")])
@pytest.mark.parametrize("group", ["channel", "tensor"])
def test_zero_points_choose_the_kernel_that_is_faster_for_the_size(channels, is_deep, bits, grid, group, path):
    """Filters of 256 inputs and more are faster as a product of matrices, which onnxruntime takes where a zero point is not 0.

    8 bits are multiplied as uint8, about whatever zero point.
    """
    x = torch.randn(2, channels, 9, 9)
    model = Conv(F.conv2d, (24, channels, 3, 3), bits, grid=grid, group=group, ranges=group).eval()
    result = export_onnx(model, x, path, activations="int8", calibration=[x])
    assert (result.weights[0].rule, result.max_relative_error < 1e-5) == ("int8", True)
    ops, (found,) = run_optimized(path, x)
    assert ops.count("QLinearConv") == 1
    weight, steps, zero_points = _int8_filters(path)
    assert bits == 8 or zero_points.any() == is_deep
    assert (np.abs(weight - model.weight().detach().numpy()) <= 1e-6 * steps).all()
    assert int8_error(found, model(x)) < 0.02


def _int8_filters(path):
    """The weight that the one QLinearConv of an optimized file multiplies with, its steps and its zero points."""
    graph = onnx.load(path.with_suffix(".optimized")).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (node,) = [node for node in graph.node if node.op_type == "QLinearConv"]
    levels, steps, zero_points = (values[name] for name in node.input[3:6])
    steps, zero_points = (each.reshape(-1, *[1] * (levels.ndim - 1)) for each in (np.abs(steps), zero_points))
    return (levels.astype(np.float32) - zero_points) * steps, steps, zero_points


@pytest.mark.parametrize(("groups", "is_int8"), [(1, True), (2, True), (4, False), (32, False)])
def test_narrow_groups_stay_float(groups, is_int8, path):
    """onnxruntime's int8 kernel for groups of few channels is 1.3 to 5 times slower than float."""
    model = Conv(lambda x, w: F.conv2d(x, w, padding=1, groups=groups), (64, 64 // groups, 3, 3), 8).eval()
    x = torch.randn(1, 64, 8, 8)
    (record,) = export_onnx(model, x, path, activations="int8", calibration=[x]).weights
    assert record.rule == ("int8" if is_int8 else "fold")
    assert is_int8 or f"{groups} groups of {64 // groups} channels" in record.reason


def test_what_stays_float_says_why(path):
    wide = Conv(F.conv2d, (8, 16, 3, 3), 12, name="wide")
    blocks = Conv(F.conv2d, (8, 16, 3, 3), 4, group=8, ranges=8, name="blocks")
    up = Conv(F.conv_transpose2d, (16, 8, 3, 3), 4, axis=1, name="up")
    result = export_onnx(Parallel(wide, blocks, up).eval(), IMAGE, path, activations="int8", calibration=[IMAGE])
    assert [record.rule for record in result.weights] == ["fold"] * 3
    reasons = [record.reason for record in result.weights]
    assert "widest channel has 12" in reasons[0]
    assert "blocks of 8" in reasons[1]
    assert "no integer kernel for ConvTranspose" in reasons[2]


def test_onnxruntime_has_no_integer_transposed_convolution(path):
    """If this fails onnxruntime has learned it, and the rule ``int8`` should take ConvTranspose in."""
    rng, numbers = np.random.default_rng(0), onnx.numpy_helper.from_array
    constants = {"s": np.float32(0.02), "z": np.uint8(120), "ws": np.full(8, 0.01, np.float32), "wz": np.zeros(8, np.int8)}
    constants["w"] = rng.integers(-127, 127, (16, 8, 4, 4)).astype(np.int8)
    make = onnx.helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        make("DequantizeLinear", ["xq", "s", "z"], ["xf"]),
        make("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=1),
        make("ConvTranspose", ["xf", "wf"], ["yf"], strides=[2, 2]),
        make("QuantizeLinear", ["yf", "s", "z"], ["yq"]),
        make("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (("x", [1, 16, 8, 8]), ("y", None)))
    graph = onnx.helper.make_graph(nodes, "graph", [x], [y], [numbers(np.asarray(array), name) for name, array in constants.items()])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "ConvTranspose" in {node.op_type for node in onnx.load(path).graph.node}


def test_a_bias_beyond_int32_stays_float(path):
    model = nn.Sequential(nn.Conv2d(16, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        model[2].weight[1] *= 1e-12
    result = export_onnx(converted(model, IMAGE), IMAGE, path, activations="int8", calibration=[IMAGE])
    assert [record.rule for record in result.weights] == ["int8", "fold"]
    assert "bias of channel 1" in result.weights[1].reason


def test_ranges_come_from_the_calibration(path):
    """Twice the range is twice the step: the ranges are those of the data, not of the example."""
    model = Conv(F.conv2d, (8, 16, 3, 3), 8).eval()
    scales = []
    for factor in (1, 2):
        export_onnx(model, torch.randn(2, 16, 14, 14), path, activations="int8", calibration=(factor * IMAGE for _ in range(2)))
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        scales.append(float(tensors["x.scale"]))
    assert scales[0] == pytest.approx(float(IMAGE.max() - IMAGE.min()) / 255)
    assert scales[1] == pytest.approx(2 * scales[0])


def test_float16_rest_and_batch_norm(path):
    model = converted(Net(), IMAGE, rest_dtype="float16")
    result = export_onnx(model, IMAGE, path, activations="int8", calibration=[IMAGE])
    assert result.max_relative_error < 1e-4


NAN = IMAGE.clone()
NAN[0, 0, 0, 0] = float("nan")
BAD = {
    "empty": ([], "calibration is empty"),
    "nan": ([IMAGE, NAN], "calibration item 2, input 'x' has 1 values that are not finite"),
    "shape": ([torch.zeros(2, 3, 14, 14)], r"item 1, input 'x' has shape \(2, 3, 14, 14\), the model takes \(batch, 16, 14, 14\)"),
    "rank": ([torch.zeros(16, 14, 14)], r"has shape \(16, 14, 14\)"),
    "dtype": ([IMAGE.double()], "is torch.float64, the example torch.float32"),
    "labels": ([(IMAGE, torch.zeros(2))], "has 2 tensors, example_inputs 1: leave labels out"),
    "text": (["images"], "item 1 is a str"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calibration_writes_nothing(case, path):
    items, message = BAD[case]
    path.write_bytes(b"old")
    model = Conv(F.conv2d, (8, 16, 3, 3), 4).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ExportError, match=message):
        export_onnx(model, IMAGE, path, activations="int8", calibration=items)
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.onnx"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_choices_that_do_not_go_together(path):
    model = Conv(F.conv2d, (8, 16, 3, 3), 4).eval()
    for options, error, message in (
        ({"activations": "int4"}, ValueError, "must be one of"),
        ({"activations": "int8"}, ValueError, "needs calibration"),
        ({"calibration": [IMAGE]}, ValueError, "of no use"),
        ({"activations": "dynamic", "layout": "qdq"}, ValueError, "leaves activations in float"),
        ({"activations": "int8", "calibration": 3}, TypeError, "got int"),
    ):
        with pytest.raises(error, match=message):
            export_onnx(model, IMAGE, path, **options)
    assert not path.exists()


class Table(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.table = store(*args, **kwargs)

    def forward(self, ids):
        return F.embedding(ids, self.table())


TABLES = [
    *({"bits": bits, "grid": grid} for bits in (2, 4, 8, 12) for grid in ("affine", "symmetric")),
    {"bits": 4, "group": "tensor", "ranges": "tensor"},
    {"bits": 4, "group": 48, "ranges": 48},
    {"bits": torch.tensor([2, 4, 8])[torch.randint(3, (4000, 1))]},
]


def test_embeddings_pick_integer_rows(path, tmp_path):
    tables = [Table(torch.randn(4000, 100), name=f"t{i}", **options) for i, options in enumerate(TABLES)]
    model = Parallel(*tables, Table(torch.randn(4000, 100).half(), 4, name="half")).eval()
    result = export_onnx(model, torch.zeros(1, 7, dtype=torch.long), path)
    assert {record.rule for record in result.weights} == {"rows"}
    assert {record.reason for record in result.weights} == {None}
    ids = torch.randint(4000, (3, 7))
    ops, outputs = run_optimized(path, ids)
    assert_same(outputs, model(ids), tolerance=1e-6)
    assert not {"DequantizeLinear", "Transpose"} & set(ops)
    optimized = onnx.load(path.with_suffix(".optimized")).graph
    large = [tensor for tensor in optimized.initializer if np.prod(tensor.dims) >= 4000 * 100]
    assert len(large) == len(TABLES) + 1, "no float table beside the integers"
    assert not [tensor.name for tensor in large if tensor.data_type == onnx.TensorProto.FLOAT]


def test_small_tables_are_folded(path):
    result = export_onnx(Table(torch.randn(100, 64), 4).eval(), torch.zeros(1, 7, dtype=torch.long), path)
    assert result.weights[0].rule == "fold"


def test_tied_table_and_dynamic_head_store_one_table(path):
    model = Tied(2000, 384, 4).eval()
    result = export_onnx(model, torch.zeros(1, 32, dtype=torch.long), path, activations="dynamic")
    assert result.weights[0].rule == "dynamic+rows"
    assert len(levels_in(path)) == 1
    ids = torch.randint(2000, (2, 32))
    _, (found,) = run_optimized(path, ids)
    assert int8_error(found, model(ids)) < 0.015


def operators_of_a_run(path, x):
    """What onnxruntime's profiler saw in the second run of a file."""
    options = session_options(path)
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(2):
        session.run(None, {session.get_inputs()[0].name: x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    second = sorted(event["ts"] for event in events if event["name"] == "model_run")[1]
    return [event["args"]["op_name"] for event in events if event["ts"] >= second and event["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("bits", "activations"), [(4, "float"), (12, "float"), (8, "dynamic")])
def test_recurrent_weights_cost_nothing_per_run(kind, bits, activations, path):
    model = Swapped(kind(32, 48, batch_first=True), bits).eval()
    result = export_onnx(model, torch.randn(2, 5, 32), path, activations=activations)
    assert {record.rule for record in result.weights} == {"fold"}
    x = torch.randn(2, 5, 32)
    left, (found,) = run_optimized(path, x)
    assert_same(found, model(x))
    per_run = {"DequantizeLinear", "Cast", "Sub"}  # Mul and Concat make the shape of the first state
    assert not per_run & set(left)
    assert not per_run & set(operators_of_a_run(path, x))
    graph = onnx.load(path.with_suffix(".optimized")).graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    recurrent = [node for node in graph.node if node.op_type == kind.__name__]
    assert len(recurrent) == (0 if kind is nn.RNN else 1), "torch writes nn.RNN as a product for each step"
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "FusedGemm")]
    for weight in [name for node in recurrent for name in node.input[1:3]] + [node.input[1] for node in products]:
        assert weight in floats, "the weights are float constants"
    assert recurrent or products
    assert not [tensor.name for tensor in graph.initializer if ".levels" in tensor.name], "no integers are left to dequantize"


def test_wide_recurrent_products_are_not_dequantized_per_run(path):
    """Steps of an nn.RNN whose weight is worth fusing hold it once, in float, when there are more of them than copies are worth."""
    model = Swapped(nn.RNN(512, 512, batch_first=True), 4).eval()
    export_onnx(model, torch.randn(1, 6, 512), path)
    x = torch.randn(1, 6, 512)
    assert "DequantizeLinear" not in operators_of_a_run(path, x)
