"""The command line: what it prints, and that errors are one message and exit code 2."""

import html
import importlib
import json
import os
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from typer.testing import CliRunner

import diffq_fx
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


def test_a_float_file_with_other_names_is_paired_by_position(tmp_path, float_file):
    model = onnx.load(float_file)
    for entry, name in ((model.graph.input[0], "input"), (model.graph.output[0], "linear_1")):
        entry.name = name
    model.graph.node[0].input[0], model.graph.node[0].output[0] = "input", "linear_1"
    onnx.save(model, tmp_path / "other.onnx")
    said = "paired by their order: 'input' with 'x', 'linear_1' with 'y'"
    assert said in " ".join(invoke("bench", tmp_path / "other.onnx", float_file, *RUN_FAST).stdout.split())
    page = tmp_path / "page.html"
    assert invoke("report", float_file, "--beside", tmp_path / "other.onnx", "--repeats", "2", "--out", page).exit_code == 0
    assert said in html.unescape(page.read_text())


def test_bench_json_is_strict_json_even_for_infinite_differences(tmp_path, float_file):
    zeros = scaled_file(tmp_path / "zeros.onnx", 0.0)
    result = invoke("bench", zeros, float_file, "--json", *RUN_FAST)
    entries = json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert entries["worst_output"]["max_relative"] == "inf"
    assert entries["repeats"] == 2
    assert set(entries["ratio"]) == {"q1", "median", "q3"}


def test_errors_are_one_message_and_exit_code_2(tmp_path, float_file):
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\0garbage")
    cases = {
        ("inspect", tmp_path / "missing.onnx"): "there is no file",
        ("inspect", garbage): "is not an ONNX file, or was cut short",
        ("bench", float_file, garbage): "is not an ONNX file, or was cut short",
        ("bench", float_file, float_file, "--repeats", "0"): "repeats must be a whole number of at least 1, got 0",
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
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "diffq-fx-demo"):
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text("[]")
    assert invoke("demo").exit_code == 0
    assert invoke("demo", "--out", tmp_path, "--quick", "--small").exit_code == 0
    assert calls == [
        {"out": Path("diffq-fx-demo"), "quick": False, "small": False},
        {"out": tmp_path, "quick": True, "small": True},
    ]


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffq_fx.demo", None)
    result = invoke("demo")
    assert result.exit_code == 2
    assert "needs the module 'diffq_fx.demo', which is not installed" in result.stderr


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Files that no command reads, by what its sentence has to say."""
    folder = tmp_path_factory.mktemp("kinds")
    torch.save({"w": torch.zeros(4, 4)}, folder / "saved.pt")
    torch.save({"w": torch.zeros(4, 4)}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(4, 4), torch.zeros(1, 4)), folder / "scripted.pt")
    torch.export.save(torch.export.export(torch.nn.Linear(4, 4), (torch.zeros(1, 4),)), folder / "program.pt2")
    (folder / "empty").write_bytes(b"")
    (folder / "text.txt").write_text("Grüße\n" * 200)
    (folder / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    (folder / "cut.pt").write_bytes((folder / "saved.pt").read_bytes()[:200])
    with zipfile.ZipFile(folder / "some.zip", "w") as archive:
        archive.writestr("readme", "x")
    return folder


SENTENCES = {
    ".": "is a folder: give a file in it",
    "saved.pt": "is a pickle",
    "legacy.pt": "is a pickle",
    "scripted.pt": "is a model of torch.jit",
    "program.pt2": "is a program of torch.export",
    "empty": "is empty",
    "text.txt": "is a text file",
    "pointer.onnx": "run git lfs pull",
    "model.gguf": "is a GGUF file",
    "cut.pt": "is a zip archive that was cut short",
    "some.zip": "is a zip archive: give a file in it",
}


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("command", ["inspect", "pack", "unpack", "bench", "report"])
def test_a_file_of_another_kind_gets_its_sentence(command, name, kinds, float_file, tmp_path):
    out = tmp_path / "out"
    rest = {"inspect": [], "pack": [out], "unpack": [out], "bench": [float_file], "report": ["--out", out]}[command]
    result = invoke(command, kinds / name, *rest)
    assert result.exit_code == 2
    assert result.stderr.startswith("diffq-fx: ")
    assert f"'{kinds / name}'" in result.stderr
    assert SENTENCES[name] in result.stderr
    assert "is wanted" in result.stderr
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
    assert not out.exists()


def test_a_packed_file_does_not_race(float_file, tmp_path):
    save_file({"w": torch.zeros(4, 4)}, tmp_path / "float.safetensors")
    assert "holds weights and no graph" in invoke("bench", float_file, tmp_path / "float.safetensors").stderr


def test_a_page_is_not_written_over_what_an_onnx_file_reads(float_file, tmp_path):
    onnx.save(onnx.load(float_file), tmp_path / "large.onnx", save_as_external_data=True, location="large.data", size_threshold=0)
    before = (tmp_path / "large.data").read_bytes()
    for out in (tmp_path / "large.data", tmp_path / "large.onnx"):
        result = invoke("report", tmp_path / "large.onnx", "--out", out)
        assert result.exit_code == 2
        assert "is the same file as" in result.stderr
    result = invoke("report", float_file, "--beside", tmp_path / "large.onnx", "--out", tmp_path / "large.data")
    assert "is the same file as" in result.stderr
    assert (tmp_path / "large.data").read_bytes() == before


COMMANDS = {
    "inspect": lambda folder: [folder / "float.onnx"],
    "bench": lambda folder: [folder / "float.onnx", folder / "float.onnx", *RUN_FAST],
    "report": lambda folder: [folder / "float.onnx", "--out", folder / "page.html"],
    "pack": lambda folder: [folder / "float.safetensors", folder / "packed.safetensors"],
    "unpack": lambda folder: [folder / "packed.safetensors", folder / "again.safetensors"],
}


def test_every_command_answers_in_json_alone(float_file, tmp_path):
    save_file({"w": torch.randn(40, 40)}, tmp_path / "float.safetensors")
    for name, arguments in COMMANDS.items():
        result = invoke(name, *arguments(tmp_path), "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout), name
    assert {command.callback.__name__ for command in app.registered_commands} >= COMMANDS.keys()
    for command in app.registered_commands:
        assert "--json" in invoke(command.callback.__name__, "--help").stdout


def test_what_a_library_prints_is_not_in_the_json(monkeypatch, tmp_path):
    (tmp_path / "results.json").write_text("[3]")
    module = types.ModuleType("diffq_fx.demo")
    module.run = lambda **options: sys.stdout.write("epoch 1\n")
    monkeypatch.setitem(sys.modules, "diffq_fx.demo", module)
    result = invoke("demo", "--out", tmp_path, "--json")
    assert json.loads(result.stdout) == {"folder": str(tmp_path), "results": [3]}
    assert result.stderr == "epoch 1\n"


def test_version_completion_and_exit_codes():
    assert invoke("--version").stdout == f"diffq-fx {diffq_fx.__version__}\n"
    assert "--install-completion" in invoke("--help").stdout
    assert "130" in invoke("--help").stdout
    assert invoke("inspect", "--nothing").exit_code == 2


def test_interrupted_is_one_line_and_code_130(monkeypatch):
    module = types.ModuleType("diffq_fx.demo")

    def run(**options):
        raise KeyboardInterrupt

    module.run = run
    monkeypatch.setitem(sys.modules, "diffq_fx.demo", module)
    result = invoke("demo")
    assert (result.exit_code, result.stderr) == (130, "diffq-fx: interrupted.\n")


WHILE_TORCH_IS_IMPORTED = """
import os, signal, sys
number = getattr(signal, sys.argv[1])
os.kill(os.getpid(), number)
raise SystemExit("it went on")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_while_torch_is_imported_it_is_one_line_too(name, tmp_path):
    (tmp_path / "torch.py").write_text(WHILE_TORCH_IS_IMPORTED)
    begin = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from diffq_fx_command import main; "

    def run(before=""):
        return subprocess.run([sys.executable, "-c", f"{begin}{before}main()", name], capture_output=True, text=True, check=False)

    done = run("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); ")  # which the test runner may ignore
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "diffq-fx: interrupted.\n")
    ignored = run(f"import signal; signal.signal(signal.{name}, signal.SIG_IGN); ")
    assert (ignored.returncode, ignored.stderr) == (1, "it went on\n"), "as under nohup"


@pytest.mark.parametrize(
    ("command", "code"),
    [("-W ignore -m diffq_fx bench", 130), ("-mdiffq_fx", 130), ("-m user diffq_fx", -signal.SIGINT), ("user.py", -signal.SIGINT)],
)
def test_interrupted_before_the_module_runs_it_is_one_line_too_and_whoever_imports_it_is_left_alone(command, code, tmp_path):
    (tmp_path / "torch.py").write_text(WHILE_TORCH_IS_IMPORTED.replace("sys.argv[1]", "'SIGINT'"))
    (tmp_path / "user.py").write_text("import diffq_fx")
    done = subprocess.run(
        [sys.executable, *command.replace("user.py", str(tmp_path / "user.py")).split()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == code
    assert (done.stderr == "diffq-fx: interrupted.\n") == (code == 130)


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    module = types.ModuleType("diffq_fx.demo")
    module.run = lambda **options: importlib.import_module("sklearn.nothing_of_the_kind")
    monkeypatch.setitem(sys.modules, "diffq_fx.demo", module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install 'diffq-fx[demo]'" in invoke("demo").stderr
