"""The command line: what it prints, and that errors are one message and exit code 2."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from diffq_fx.cli import app
from diffq_fx.export.onnx.metadata import ExportMetadata, WeightRecord, to_props

RUN_FAST = ["--repeats", "2", "--threads", "1"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save(path, nodes, initializers, props=None):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, props or {})
    onnx.save(model, path)
    return path


@pytest.fixture
def float_file(tmp_path):
    return scaled_file(tmp_path / "float.onnx", 1.0)


def scaled_file(path, factor):
    weight = np.random.default_rng(0).standard_normal((64, 32)) * factor
    node = helper.make_node("MatMul", ["x", "stack[0].weight"], ["y"])
    return save(path, [node], [numpy_helper.from_array(weight.astype(np.float32), "stack[0].weight")])


@pytest.fixture
def int4_file(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["levels", "scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    levels = helper.make_tensor("levels", TensorProto.INT4, [64, 32], b"\x21" * 1024, raw=True)
    record = WeightRecord(
        name="weight",
        shape=(32, 64),
        axis=0,
        grid="symmetric",
        bits={2: 1024, 3: 1024},
        containers={4: 2048},
        rule="linear",
        initializers=("levels",),
    )
    props = to_props(ExportMetadata(layout="onnxruntime", weights=(record,)))
    scale = numpy_helper.from_array(np.ones(32, np.float32), "scale")
    return save(tmp_path / "int4.onnx", nodes, [levels, scale], props)


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("inspect", "bench", "demo"):
        assert command in result.stdout
        assert invoke(command, "--help").exit_code == 0


def test_python_m_runs_the_same_command_line(float_file):
    result = subprocess.run(
        [sys.executable, "-m", "diffq_fx", "inspect", str(float_file), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["totals"]["float_payload_bytes"] == 64 * 32 * 4


def test_inspect_lists_weights_and_totals(int4_file):
    result = invoke("inspect", int4_file)
    assert result.exit_code == 0
    assert "learned bits" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("levels"))
    for cell in ("DequantizeLinear > MatMul", "64x32", "int4", "0.0010", "2.50 (2-3)", "0.0006"):
        assert cell in row
    assert "and 1 more (scales, zero points, small tensors), 0.0001 MiB together" in result.stdout
    assert "quantized, bit-packed as learned" in result.stdout
    assert (
        next(line for line in result.stdout.splitlines() if line.strip().startswith("weight ")).split()
        == "weight symmetric linear -".split()
    )
    assert "opset ai.onnx 21" in result.stdout
    everything = invoke("inspect", int4_file, "--all").stdout
    assert any(line.strip().startswith("scale ") for line in everything.splitlines())


def test_inspect_takes_files_of_others_and_their_names_literally(float_file):
    result = invoke("inspect", float_file)
    assert result.exit_code == 0
    assert "stack[0].weight" in result.stdout
    assert "learned" not in result.stdout


def test_inspect_json(int4_file):
    result = invoke("inspect", int4_file, "--json")
    entries = json.loads(result.stdout)
    assert entries["tensors"][0]["container_bits"] == 4
    assert entries["tensors"][0]["learned_payload_bytes"] == 640
    assert entries["tensors"][0]["learned_bits"] == {"2": 1024, "3": 1024}
    assert entries["totals"]["learned_payload_bytes"] == 640


def test_bench_prints_latency_ratio_size_and_difference(tmp_path, float_file):
    other = scaled_file(tmp_path / "other.onnx", 1.01)
    result = invoke("bench", float_file, other, "--batch", "3", *RUN_FAST)
    assert result.exit_code == 0, result.stderr
    for text in ("A / B", "latency ms", "size MiB", "(1 % of A's largest value)", "worst in 'y'", "x float32 [3, 64]"):
        assert text in result.stdout
    assert "median [q1, q3]" in result.stdout


def test_bench_json_is_strict_json_even_for_infinite_differences(tmp_path, float_file):
    zeros = scaled_file(tmp_path / "zeros.onnx", 0.0)
    result = invoke("bench", zeros, float_file, "--json", *RUN_FAST)
    entries = json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert entries["worst_output"]["max_relative"] == "inf"
    assert entries["repeats"] == 2
    assert set(entries["ratio"]) == {"q1", "median", "q3"}


def test_errors_are_one_message_and_exit_code_2(tmp_path, float_file):
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    cases = {
        ("inspect", tmp_path / "missing.onnx"): "there is no file",
        ("inspect", garbage): "is not an ONNX file, or was cut short",
        ("bench", float_file, garbage): "is not an ONNX file, or was cut short",
        ("bench", float_file, float_file, "--repeats", "0"): "repeats must be at least 1, got 0",
        ("bench", float_file, float_file, "--dim", "width"): "--dim takes NAME=SIZE, such as length=128, got 'width'",
        ("bench", float_file, float_file, "--dim", "width=3"): "dims names width, which no input leaves open",
    }
    for arguments, message in cases.items():
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("diffq-fx: ")
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_demo_hands_its_options_on(monkeypatch, tmp_path):
    calls = []
    module = types.ModuleType("diffq_fx.demo")
    module.run = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "diffq_fx.demo", module)
    assert invoke("demo").exit_code == 0
    assert invoke("demo", "--out", tmp_path, "--quick").exit_code == 0
    assert calls == [{"out": Path("diffq-fx-demo"), "quick": False}, {"out": tmp_path, "quick": True}]


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffq_fx.demo", None)
    result = invoke("demo")
    assert result.exit_code == 2
    assert "needs the module 'diffq_fx.demo', which is not installed" in result.stderr
