"""Files are written where the user said, whatever the name is, and nothing else is touched."""

import io
import os

import onnx
import pytest
import torch
from stored_models import Linear, assert_same, run_exact
from torch import nn

from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export import export_onnx, read_metadata, session_options
from diffq_fx.export.onnx.benchmark import compare_latency
from diffq_fx.export.onnx.inspection import inspect_onnx

NAMES = ["m[1].onnx", "exact.onnx", "model.onnx", "ä" * 120]
DATA_LIMIT = "diffq_fx.export.onnx.saving._PROTOBUF_LIMIT"


@pytest.fixture
def model():
    return nn.Sequential(Linear(256, 256, 4, name="first"), nn.ReLU(), Linear(256, 256, 4, name="second")).eval()


def operators(path):
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.parametrize("name", NAMES)
def test_any_name_gets_the_file_that_was_asked_for(name, model, tmp_path):
    path = tmp_path / name
    result = export_onnx(model, torch.randn(16, 256), path, activations="dynamic")
    assert os.listdir(tmp_path) == [name]
    assert result.file_bytes == path.stat().st_size
    assert read_metadata(path).activations == "dynamic"
    assert "DynamicQuantizeMatMul" in operators(path)


def test_files_beside_the_target_are_left_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr(DATA_LIMIT, 1000)
    beside = ("exact.onnx", "calibration.onnx", "e.onnx", "e.data", "published", "draft", "exact.onnx.data")
    for name in beside:
        (tmp_path / name).write_text(f"the user's own {name}")
    export_onnx(model, torch.randn(16, 256), tmp_path / "e", activations="int8", calibration=[torch.randn(16, 256)])
    assert all((tmp_path / name).read_text() == f"the user's own {name}" for name in beside)
    assert sorted(os.listdir(tmp_path)) == sorted((*beside, "e", "e.1.data"))  # e.data was taken
    fresh = torch.randn(3, 256)
    assert run_exact(tmp_path / "e", fresh).shape == (3, 256)


def test_a_failure_between_the_two_files_leaves_the_old_pair(model, tmp_path, monkeypatch):
    monkeypatch.setattr(DATA_LIMIT, 1000)
    path, x = tmp_path / "m[1].onnx", torch.randn(2, 256)
    export_onnx(model, x, path)
    old, replace = model, os.replace

    def fail_at_the_model(source, target):
        if os.path.basename(target) == path.name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    new = nn.Sequential(Linear(256, 256, 4, name="first"), nn.ReLU(), Linear(256, 256, 4, name="second")).eval()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail_at_the_model)
        with pytest.raises(ExportError, match="No space left"):
            export_onnx(new, x, path)
    assert_same(run_exact(path, x), old(x))
    assert sorted(os.listdir(tmp_path)) == ["m[1].onnx", "m[1].onnx.data"]
    export_onnx(new, x, path)
    assert_same(run_exact(path, x), new(x))
    assert sorted(os.listdir(tmp_path)) == ["m[1].onnx", "m[1].onnx.1.data"]  # the old pair was whole until the new one was


def test_permissions_and_links_are_kept(model, tmp_path):
    path, link = tmp_path / "real.onnx", tmp_path / "link.onnx"
    path.write_bytes(b"")
    path.chmod(0o640)
    link.symlink_to(path)
    export_onnx(model, torch.randn(2, 256), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert read_metadata(path) is not None


def test_a_pipe_is_no_place_for_a_file(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    for name in ("pipe", "link"):
        with pytest.raises(ExportError, match=f"cannot write '.*{name}': it is no regular file"):
            export_onnx(model, torch.randn(2, 256), tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


def read_by_bench(path):
    compare_latency(path, path, repeats=1)


@pytest.mark.parametrize("read", [inspect_onnx, read_metadata, session_options, read_by_bench])
@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("", DiffQError, "is a folder: give a file in it"),
        ("nul\0.onnx", DiffQError, "null"),
        ("n" * 300, DiffQError, "too long"),
        ("missing/model.onnx", FileNotFoundError, "there is no file"),
        ("file/model.onnx", FileNotFoundError, "there is no file"),
        ("secret", DiffQError, "Permission denied"),
    ],
)
def test_a_path_that_cannot_be_read_is_one_sentence(read, name, error, says, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "secret").write_text("x")
    opened = io.open

    def refuse(file, *args, **kwargs):
        if str(file).endswith("secret"):  # root may read everything
            raise PermissionError(13, "Permission denied", file)
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(error, match=says) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert repr(str(tmp_path / name))[1:-1] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "it is a folder"),
        ("nul\0.onnx", "null"),
        ("n" * 300, "too long"),
        ("missing/m.onnx", "No such"),
        ("file/m.onnx", "Not a directory"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_sentence(name, says, model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=f"^export_onnx: cannot write .*: .*{says}") as caught:
        export_onnx(model, torch.randn(2, 256), tmp_path / name)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_one_sentence(model, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ExportError, match="^export_onnx: cannot write '.*m.onnx': Permission denied$"):
        export_onnx(model, torch.randn(2, 256), tmp_path / "m.onnx")
