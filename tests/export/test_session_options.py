"""session_options: what a file asks for, exact runs, and what cannot be had."""

import onnx
import onnxruntime
import pytest
import torch
from stored_models import Linear, assert_same

from diffq_fx.errors import ExportError
from diffq_fx.export import export_onnx, read_metadata, session_options
from diffq_fx.export.onnx.benchmark import compare_latency

LEVEL = "session.qdq_matmulnbits_accuracy_level"


def test_a_file_carries_its_options(path):
    export_onnx(Linear(512, 512, 4).eval(), torch.zeros(1, 512), path)
    assert read_metadata(path).session == {LEVEL: "4"}
    options = session_options(path, threads=2)
    assert options.get_session_config_entry(LEVEL) == "4"
    assert options.intra_op_num_threads == 2
    assert compare_latency(path, path, repeats=1).session_a == {LEVEL: "4"}, "diffq-fx bench uses them"


def test_exact_is_pytorch_and_fast_is_close(path):
    model = Linear(512, 512, 4).eval()
    result = export_onnx(model, torch.zeros(1, 512), path)
    x = torch.randn(7, 512)
    found = {}
    for exact in (True, False):
        session = onnxruntime.InferenceSession(str(path), session_options(path, exact=exact), providers=["CPUExecutionProvider"])
        found[exact] = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert_same(found[True], model(x))
    assert_same(found[False], model(x), tolerance=0.03)
    assert not torch.equal(found[True], found[False])
    assert result.max_relative_error < 1e-4 < result.fast_relative_error < 0.03


def test_exact_cannot_be_had_of_rounded_activations(path):
    export_onnx(Linear(512, 512, 4).eval(), torch.zeros(32, 512), path, activations="dynamic")
    assert session_options(path).get_session_config_entry(LEVEL) == "4"
    with pytest.raises(ExportError, match=r"rounds activations in its graph .activations='dynamic'"):
        session_options(path, exact=True)


def test_layout_qdq_asks_for_nothing(path):
    export_onnx(Linear(512, 512, 4).eval(), torch.zeros(1, 512), path, layout="qdq")
    assert read_metadata(path).session == {}


def test_bad_arguments(path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        session_options(path)
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(ExportError, match="was not written by export_onnx"):
        session_options(path)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        session_options(path, threads=-1)
