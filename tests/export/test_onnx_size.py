"""What a file takes beside its levels and scales, and what is left out of it."""

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from stored_models import Conv, assert_same, run_exact
from torch import nn

from diffq_fx import DiffQConfig, bits_report, convert_diffq, prepare_diffq
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.inspection import inspect_onnx
from diffq_fx.export.onnx.slimming import drop_what_is_derived

pytestmark = pytest.mark.filterwarnings("ignore:convert. the bits never moved")


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2000, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(256, 2000)

    def forward(self, ids):
        return self.head(self.layers(self.embedding(ids)))


def images():
    widths = [3, 64, 128, 256, 320, 320]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 1000))


MODELS = {
    "transformer": (Transformer, lambda: torch.randint(2000, (2, 16)), 2000),
    "images": (images, lambda: torch.randn(4, 3, 32, 32), 1000),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_file_is_within_3_percent_of_its_payload(name, path):
    """With widths that ONNX has, no bit of a container is lost, and all that is not levels and scales is small."""
    make, draw, classes = MODELS[name]
    model = prepare_diffq(make(), draw(), DiffQConfig(target_bits=4, size_of="onnx_file"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(6):
        x = draw()
        logits = model(x).flatten(0, -2)
        loss = nn.functional.cross_entropy(logits, torch.randint(classes, logits.shape[:1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    converted = convert_diffq(model)
    result = export_onnx(converted, draw(), path)
    report = bits_report(converted)
    assert len({bits for bits, count in report.histogram.items() if count}) > 1, "the bits have moved"
    assert set(report.histogram) <= {2, 4, 8}
    tensors = inspect_onnx(path).tensors
    others = sum(tensor.payload_bytes for tensor in tensors if tensor.role in ("scale", "zero_point", "float"))
    assert result.file_bytes == path.stat().st_size > 2**20
    assert result.file_bytes <= 1.03 * (result.container_payload_bytes + others)
    assert result.file_bytes <= 1.03 * 2**20 * report.packed_size.total_mib


def test_shapes_that_inference_finds_are_left_out(path):
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    export_onnx(
        convert_diffq(prepare_diffq(model, torch.randn(2, 64), DiffQConfig(target_bits=None, min_size=0))), torch.randn(2, 64), path
    )
    file = onnx.load(path)
    assert not file.graph.value_info
    assert not [value.metadata_props for value in (*file.graph.input, *file.graph.output) if value.metadata_props]
    inferred = onnx.shape_inference.infer_shapes(file, strict_mode=True)
    known = {value.name for value in inferred.graph.value_info} | {value.name for value in file.graph.output}
    assert {name for node in file.graph.node for name in node.output} <= known


def test_shapes_that_inference_does_not_find_are_kept():
    """Of an operator that onnx does not know, and of one in a file whose sizes onnx cannot compute."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["batch", 4]))
    nodes = [ir.node("Mystery", [x], domain="somebody"), ir.node("Relu", [x])]
    nodes.append(ir.node("Add", [node.outputs[0] for node in nodes]))
    for node, name in zip(nodes, ("unknown", "known", "y"), strict=True):
        node.outputs[0].name = name
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["batch", 4])
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": 20, "somebody": 1})
    drop_what_is_derived(model := ir.Model(graph, ir_version=9))
    assert [value.name for value in ir.to_proto(model).graph.value_info] == ["unknown"]


def test_symbolic_sizes_that_fusions_compare_are_kept(path):
    """SkipLayerNormalization takes two inputs of one shape, batch and length included."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

        def forward(self, x):
            n, t, _ = x.shape
            heads = self.layer(x).view(n, t, 4, 16).transpose(1, 2)
            return self.norm(x + heads.softmax(-1).transpose(1, 2).reshape(n, t, 64))

    x = torch.randn(2, 7, 64)
    model = convert_diffq(prepare_diffq(Net().eval(), x, DiffQConfig(target_bits=None, min_size=0)))
    result = export_onnx(model, x, path)
    assert "SkipLayerNormalization" in result.operators


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranges", ["channel", "tensor"])
def test_batch_norms_are_in_the_scales(bias, ranges, path):
    convolution = nn.Conv2d(8, 16, 3, bias=bias)
    model = nn.Sequential(convolution, nn.BatchNorm2d(16), nn.ReLU())
    nn.init.normal_(model[1].weight)
    model[1].weight.data[2] = 0
    model(torch.randn(8, 8, 9, 9))
    converted = convert_diffq(
        prepare_diffq(model.eval(), torch.randn(2, 8, 9, 9), DiffQConfig(target_bits=None, min_size=0, range_per=ranges))
    )
    export_onnx(converted, torch.randn(2, 8, 9, 9), path)
    graph = onnx.load(path).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert sum(onnx.numpy_helper.to_array(tensor).size for tensor in floats) == 2 * 16, "a scale and a bias for each channel"
    x = torch.randn(5, 8, 9, 9)
    assert_same(run_exact(path, x), converted(x))


def test_a_batch_norm_that_others_read_too_stays(path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = Conv(nn.functional.conv2d, (8, 4, 3, 3), 4)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.convolution(x)
            return x + self.norm(x)

    model = Net()
    model(torch.randn(4, 4, 6, 6))
    export_onnx(model.eval(), torch.randn(2, 4, 6, 6), path)
    assert "BatchNormalization" in {node.op_type for node in onnx.load(path).graph.node}


def test_a_batch_norm_in_half_precision_stays(path):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval().half()
    converted = convert_diffq(prepare_diffq(model, torch.randn(2, 8, 6, 6).half(), DiffQConfig(target_bits=None, min_size=0)))
    export_onnx(converted, torch.randn(2, 8, 6, 6).half(), path)
    assert "BatchNormalization" in {node.op_type for node in onnx.load(path).graph.node}


def test_rows_of_several_containers_are_joined_when_the_file_is_loaded(path):
    bits = torch.tensor([2, 4, 8])[torch.randint(3, (600, 1))]
    model = Conv(nn.functional.conv1d, (600, 16, 9), bits).eval()
    export_onnx(model, torch.randn(1, 16, 12), path)
    part = next(tensor for tensor in onnx.load(path).graph.initializer if tensor.name == "weight.part")
    assert part.data_type == onnx.TensorProto.UINT2
    assert len(part.raw_data) == 600 * 2 // 8
    x = torch.randn(3, 16, 12)
    assert_same(run_exact(path, x), model(x))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert {node.op_type for node in onnx.load(path.with_suffix(".optimized")).graph.node} == {"Conv"}
