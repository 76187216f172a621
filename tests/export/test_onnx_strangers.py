"""ONNX files that nobody's exporter wrote: one error of ours in little time, whatever they say; benchmarks/fuzz.py makes such by the thousand."""

import json
from contextlib import suppress

import pytest
import torch
from onnx import FunctionProto, TensorProto, helper
from stored_models import Linear
from test_inspection import X, Y, floats, levels, matmul, save
from typer.testing import CliRunner

from diffq_fx.cli import app
from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export import export_onnx, session_options
from diffq_fx.export.onnx.benchmark import compare_latency
from diffq_fx.export.onnx.inspection import inspect_onnx

WEIGHT = {"shape": [8, 4], "axis": 0, "grid": "affine", "bits": {"4": 32}, "containers": {"4": 32}, "rule": "linear"}


def props(weight=None, **entries):
    weights = json.dumps({"w": WEIGHT | weight}) if isinstance(weight, dict) else weight or "{}"
    found = {"schema": "1", "producer": "diffq_fx", "layout": "qdq", "activations": "float", "weights": weights, **entries}
    return {f"diffq_fx.{key}": value for key, value in found.items()}


METADATA = {
    "weights nested without end": props("[" * 100_000),
    "an endless count": props({"bits": {"4": float("inf")}}),
    "a count that no float holds": props({"bits": {"4": 10**400}}),
    "a negative count": props({"bits": {"4": -32}}),
    "a container of 0": props({"containers": {"0": 32}}),
    "a reason that is a number": props({"reason": 5}),
    "a choice that is a list": props({"choice": ["a"]}),
    "remarks that are numbers": props({"remarks": [1, 2]}),
    "initializers that are lists": props({"initializers": [["w"]]}),
    "a rule that is nothing": props({"rule": None}),
    "sizes of text": props(sizes='{"length": "long"}'),
    "sizes that are a list": props(sizes="[1]"),
    "no containers": props({"containers": {}}),
    "a schema that is no number": props(schema="one"),
    "a long number": props(schema="9" * 5000),
}


@pytest.mark.parametrize("entries", METADATA.values(), ids=METADATA)
def test_metadata_that_cannot_be(entries, tmp_path):
    path = save(tmp_path / "m.onnx", [matmul()], [floats("w", 8, 4)], props=entries)
    for read in (inspect_onnx, session_options):
        with pytest.raises(ExportError, match=r"diffq_fx metadata is damaged.*Export the model again"):
            read(path)


def changed(tensor, **fields):
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(tensor, name)[:]
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    return tensor


def outside(**entries):
    tensor = TensorProto(name="w", dims=[8, 4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


NBITS = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", bits=0, N=0, K=0, block_size=16)
FILES = {
    "a type that is none": ([matmul()], [changed(floats("w", 8, 4), data_type=0)]),
    "a type of the future": ([matmul()], [changed(floats("w", 8, 4), data_type=255)]),
    "a negative side": ([matmul()], [changed(floats("w", 8, 4), dims=[8, -4])]),
    "more values than there are bytes in the world": ([matmul()], [TensorProto(name="w", dims=[2**62, 2**62], data_type=1)]),
    "a constant without a name": ([helper.make_node("Constant", [], [], value=floats("w", 8, 4))], []),
    "packed in no bits": ([NBITS], [levels("q", [8, 4], TensorProto.UINT8, 8), floats("s", 8)]),
    "an absolute place": ([matmul()], [outside(location="/etc/hostname")]),
    "a place above the file's": ([matmul()], [outside(location="../m.onnx")]),
    "a place that is no name": ([matmul()], [outside(location="a\0b")]),
    "a negative length": ([matmul()], [outside(location="m.onnx", length="-5")]),
    "a length that is no number": ([matmul()], [outside(location="m.onnx", length="all")]),
}


@pytest.mark.parametrize(("nodes", "tensors"), FILES.values(), ids=FILES)
def test_tensors_and_nodes_that_cannot_be(nodes, tensors, tmp_path):
    path = save(tmp_path / "m.onnx", nodes, tensors, props=props())
    with pytest.raises((DiffQError, FileNotFoundError), match=r"m.onnx' is damaged: |keeps weights outside of its folder|which is missing"):
        inspect_onnx(path)


@pytest.mark.parametrize("place", ["m.onnx.a/b.data", "m.onnx.\0.data", "all"])
def test_an_export_writes_over_a_damaged_file(place, tmp_path):
    """It looks for the second file of an earlier export, whose name a stranger may have written."""
    path = save(tmp_path / "m.onnx", [matmul()], [outside(location=place, length="0" if "." in place else "all")], props=props())
    assert export_onnx(Linear(64, 64, 4).eval(), torch.zeros(1, 64), path, verify=False).weights


def test_names_that_are_no_text(tmp_path):
    path = save(tmp_path / "m.onnx", [matmul("weight")], [floats("weight", 8, 4)], props=props())
    for name in (b"weight", b"MatMul", b"diffq_fx.schema", b"qdq"):
        assert name in path.read_bytes()
        damaged = tmp_path / "damaged.onnx"
        damaged.write_bytes(path.read_bytes().replace(name, name[:-1] + b"\xff"))
        with suppress(DiffQError):
            json.dumps(inspect_onnx(damaged).to_dict())


def function(name, calls):
    nodes = [helper.make_node(callee, ["a"], [f"b{place}"], domain="d") for place, callee in enumerate(calls)]
    nodes.append(helper.make_node("Concat", [f"b{place}" for place in range(len(calls))], ["b"], axis=0))
    return helper.make_function("d", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)])


def with_functions(path, functions: list[FunctionProto], nodes):
    import onnx

    model = onnx.load(save(path, nodes, [floats("w", 8, 4)], inputs=(X,), outputs=(Y,)))
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("d", 1))
    onnx.save(model, path)
    return path


CALL = [helper.make_node("f0", ["w"], ["y"], domain="d")]
BRANCHES = [
    node
    for step in range(40)
    for before in ["w" if not step else f"c{step - 1}"]
    for node in (
        helper.make_node("Cast", [before], [f"a{step}"], to=1),
        helper.make_node("Transpose", [before], [f"b{step}"]),
        helper.make_node("Concat", [f"a{step}", f"b{step}"], [f"c{step}"], axis=0),
    )
]
TANGLES = {
    "two calls of two calls": ([function(f"f{k}", [f"f{k + 1}"] * 2) for k in range(40)], CALL),
    "two ways at forty forks": ([], BRANCHES),
}


@pytest.mark.parametrize(("functions", "nodes"), TANGLES.values(), ids=TANGLES)
def test_tangles_that_would_take_for_ever(functions, nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.onnx.usage._MOST_WAYS", 5000)
    with pytest.raises(DiffQError, match=r"m.onnx' is damaged: .* more than \d+ ways"):
        inspect_onnx(with_functions(tmp_path / "m.onnx", functions, nodes))


def test_functions_that_call_themselves_are_operators(tmp_path):
    path = with_functions(tmp_path / "m.onnx", [function("f0", ["f1"]), function("f1", ["f0", "f1"])], CALL)
    assert inspect_onnx(path).tensors[0].readers == ("f0",)


def test_session_entries_of_others_are_refused(tmp_path):
    """onnxruntime has entries that name folders to read from."""
    key = "session.model_external_initializers_file_folder_path"
    path = save(tmp_path / "m.onnx", [matmul()], [floats("w", 8, 4)], props=props(**{key: "/etc"}))
    for use in (session_options, lambda path: compare_latency(path, path, repeats=1)):
        with pytest.raises(DiffQError, match=f"asks for the session entry '{key}', which no exported file needs"):
            use(path)


def test_control_characters_are_shown_not_obeyed(tmp_path):
    clear, title = "\x1b[2J", "\x1b]0;mine\x07"
    name, told = f"w{clear}", {"remarks": [title], "initializers": ["w"]}
    path = save(tmp_path / "m.onnx", [matmul(name)], [floats(name, 8, 4)], props=props(told, target="\r\x9b"))
    found = CliRunner().invoke(app, ["inspect", "--all", str(path)])
    assert found.exit_code == 0
    assert r"w\x1b[2J" in found.output
    assert not set(found.output) & set("\x1b\x07\r\x9b")
    path = save(tmp_path / "m.onnx", [matmul(name)], [changed(floats(name, 8, 4), raw_data=b"")])
    with pytest.raises(DiffQError) as caught:
        inspect_onnx(path)
    assert r"tensor 'w\x1b[2J' of shape" in str(caught.value)
    found = CliRunner().invoke(app, ["inspect", str(path)])
    assert (found.exit_code, "\x1b" in found.output) == (2, False)
