"""Each preset is read by its runtime, which computes what the model computes; and what each offline tool leaves of a file."""

import numpy as np
import onnx
import pytest
import torch
from runtimes import RUNNERS, run_onnxruntime, run_reference
from stored_models import Conv, Linear, store
from torch import nn
from torch.nn import functional as F

from diffq_fx import ExportError, convert, prepare
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.options import RUNTIMES
from diffq_fx.methods import ProductQuantization

TYPES = onnx.TensorProto.DataType
NARROW = {TYPES.INT2: 2, TYPES.UINT2: 2, TYPES.INT4: 4, TYPES.UINT4: 4, TYPES.INT8: 8, TYPES.UINT8: 8}


class Mixed(nn.Module):
    """Every way in which a weight is read, at widths from 1 to 8 bits."""

    def __init__(self):
        super().__init__()
        self.table = store(torch.randn(20, 32), 2, name="table", grid="symmetric")
        self.filters = Conv(F.conv1d, (32, 32, 3), 3, name="filters")
        self.centred = Linear(32, 64, 1, name="centred", grid="half")
        self.grouped = Linear(64, 32, 2, name="grouped", group=16, ranges=16)
        self.mixed = Linear(32, 16, torch.tensor([2, 4, 8, 3] * 4)[:, None], name="mixed")
        coded = nn.Linear(16, 8)
        self.coded = convert(prepare(coded, torch.randn(2, 16), ProductQuantization(entries=4, block_size=4)))

    def forward(self, ids):
        h = self.filters(F.embedding(ids, self.table()).transpose(1, 2)).transpose(1, 2)
        return self.coded(self.mixed(self.grouped(self.centred(h).relu())))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def exported(mixed, tmp_path_factory):
    """Runtime -> the file and the result of its export; runtimes of the same options share a file."""
    made = {}

    def export(runtime):
        options = tuple(RUNTIMES[runtime].items())
        if options not in made:
            path = tmp_path_factory.mktemp("runtimes") / "model.onnx"
            made[options] = path, export_onnx(mixed, torch.randint(20, (2, 9)), path, runtime=runtime)
        return made[options]

    return export


def assert_computes(model, found, *inputs, within=1e-4):
    expected = model(*inputs).detach().numpy()
    assert np.abs(found - expected).max() < within * np.abs(expected).max()


def narrowest(path):
    return min(NARROW[tensor.data_type] for tensor in onnx.load(path).graph.initializer if tensor.data_type in NARROW)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_preset_is_read_by_its_runtime(runtime, mixed, exported):
    """Numbers as PyTorch's; onnxruntime's converter fixes products that round their inputs to 8 bits."""
    path, result = exported(runtime)
    assert narrowest(path) == RUNTIMES[runtime]["min_container"]
    assert result.layout == RUNTIMES[runtime]["layout"]
    for shape in ((1, 9), (3, 5)):
        ids = torch.randint(20, shape)
        (found,) = RUNNERS[runtime](path, {"ids": ids.numpy()})
        assert_computes(mixed, found, ids, within=0.03 if runtime == "ort-format" else 1e-4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ort-format"])
def test_onnx_itself_reads_the_files_for_every_runtime(runtime, mixed, exported):
    ids = torch.randint(20, (3, 9))
    (found,) = run_reference(exported(runtime)[0], {"ids": ids.numpy()})
    assert_computes(mixed, found, ids)


@pytest.mark.parametrize(("least", "opset"), [(4, 21), (8, 20)])
def test_a_larger_smallest_container_changes_no_number(least, opset, mixed, path):
    ids = torch.randint(20, (2, 9))
    result = export_onnx(mixed, ids, path, min_container=least)
    assert (narrowest(path), result.opset) == (least, opset)
    assert all(min(record.containers) >= least for record in result.weights)
    assert {width for record in result.weights for width in record.bits} == {1, 2, 3, 4, 8}, "the learned bits are as they were"
    (found,) = run_onnxruntime(path, {"ids": ids.numpy()})
    assert_computes(mixed, found, ids)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"runtime": "openvino", "layout": "onnxruntime"},
            "runtime='openvino' stands for layout='qdq', min_container=4 or more, got layout='onnxr",
        ),
        ({"runtime": "openvino", "min_container": 2}, "got min_container=2: leave one of the two out"),
        ({"runtime": "openvino", "activations": "dynamic"}, 'layout "qdq" leaves activations in float'),
        ({"runtime": "tflite"}, r"runtime must be one of \('onnxruntime', .*'ort-format'\) or None, got 'tflite'"),
        ({"min_container": 3}, r"min_container must be one of \(2, 4, 8\), got 3"),
    ],
)
def test_options_that_contradict_a_runtime(options, says, old_file):
    with pytest.raises(ValueError, match=says):
        export_onnx(Linear(16, 8, 4).eval(), torch.randn(1, 16), old_file, **options)


@pytest.mark.parametrize(
    ("runtime", "options", "container"),
    [("openvino", {"layout": "qdq"}, 4), ("openvino", {"min_container": 8}, 8), ("web", {"min_container": 4}, 4)],
)
def test_what_the_runtime_reads_is_no_contradiction(runtime, options, container, path):
    result = export_onnx(Linear(16, 8, 2).eval(), torch.randn(1, 16), path, runtime=runtime, **options)
    assert result.weights[0].containers == {container: 128}


def test_a_container_that_the_opset_does_not_have(old_file):
    with pytest.raises(ExportError, match=r"UINT2 of 'weight.levels' needs 25.*or a larger min_container"):
        export_onnx(Linear(16, 8, 2).eval(), torch.randn(1, 16), old_file, opset=21)
