"""Private names of torch and onnxruntime: one file has them, and each can go without harm."""

import ast
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import diffq_fx
from diffq_fx import CaptureError, DiffQConfig, DiffQError, ExportError, _compat, convert, convert_diffq, prepare, prepare_diffq
from diffq_fx.export import export_onnx, save_packed
from diffq_fx.export.onnx.sessions import open_session
from diffq_fx.kernels import native
from diffq_fx.methods.lsq import LSQ

PACKAGE = Path(diffq_fx.__file__).parent
PRIVATE = re.compile(
    r"(torch|onnx|onnx_ir|onnxscript|onnxruntime)\.(?!nn\.modules\.|utils\._python_dispatch)([a-z_0-9]+\.)*_(?!_)"
)  # but base classes
NAMES = [name for name in vars(_compat) if name.startswith("_") and not name.startswith("__") and name != "_private"]


@pytest.fixture
def tensors():
    return [torch.randn(3, 4), torch.randn(5), torch.randn(())]


@pytest.mark.parametrize("gone", [False, True])
def test_a_row_and_back(monkeypatch, tensors, gone):
    if gone:
        monkeypatch.setattr(_compat, "_flatten", None)
        monkeypatch.setattr(_compat, "_unflatten", None)
    row = _compat.flatten(tensors)
    back = _compat.unflatten(row, tensors)
    assert row.shape == (18,)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    row.zero_()
    assert not any(part.any() for part in back)  # views


@pytest.mark.parametrize("gone", [False, True])
def test_copy_each(monkeypatch, tensors, gone):
    if gone:
        monkeypatch.setattr(_compat, "_foreach_copy", None)
    targets = [torch.zeros_like(each) for each in tensors]
    _compat.copy_each(targets, tensors)
    assert all(torch.equal(a, b) for a, b in zip(targets, tensors, strict=True))


@pytest.mark.parametrize("name", ["_interpreter_stack", "_in_dispatch_mode"])
def test_no_kernel_runs_where_torch_does_not_tell_whether_it_may(monkeypatch, name):
    rows = torch.randn(256, 256)
    if not native.takes_rows(rows):
        pytest.skip("there is no compiler")
    monkeypatch.setattr(_compat, name, None)
    assert not native.takes_rows(rows)


def test_a_transform_of_torch_func_is_seen():
    seen = []
    torch.func.vmap(lambda x: (seen.append(_compat.in_function_transform(unknown=False)), x)[1])(torch.zeros(2))
    assert seen == [True]
    assert not _compat.in_function_transform(unknown=False)


@pytest.mark.parametrize("gone", [False, True])
def test_a_hook_on_all_modules_is_seen_where_torch_tells(monkeypatch, gone):
    if gone:
        monkeypatch.setattr(_compat, "_forward_hooks", None)
    hook = nn.modules.module.register_module_forward_hook(lambda *call: None)
    try:
        assert _compat.has_global_hooks() is not gone
    finally:
        hook.remove()
    assert not _compat.has_global_hooks()


class Pair(NamedTuple):
    first: Tensor
    second: int


@pytest.mark.parametrize("gone", [False, True])
def test_trees(monkeypatch, gone):
    if gone:
        monkeypatch.setattr(_compat, "_tree_leaves", None)
        monkeypatch.setattr(_compat, "_tree_map_only", None)
    tree = {"a": [torch.ones(2), 3], "b": (torch.zeros(1), "text"), "c": Pair(torch.ones(1), 4), "d": OrderedDict(x=torch.ones(3))}
    leaves = _compat.tree_leaves(tree)
    assert [leaf.numel() if isinstance(leaf, Tensor) else leaf for leaf in leaves] == [2, 3, 1, "text", 1, 4, 3]
    mapped = _compat.map_tensors(lambda tensor: tensor + 1, tree)
    assert [type(part) for part in mapped.values()] == [list, tuple, Pair, OrderedDict]
    assert [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in _compat.tree_leaves(mapped)] == [
        [2, 2],
        3,
        [1],
        "text",
        [2],
        4,
        [2, 2, 2],
    ]
    assert tree["a"][0].tolist() == [1, 1]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(12, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0])


@pytest.mark.parametrize("gone", ["", "_decompositions", "_dispatch_key"])
def test_a_recurrent_layer_exports_with_or_without_its_shapes(monkeypatch, gone, tmp_path):
    if gone:
        monkeypatch.setattr(_compat, gone, None)
    x = torch.randn(2, 3, 12)
    model = convert(prepare(Recurrent(), x, LSQ(bits=4)))
    assert export_onnx(model, x, tmp_path / "model.onnx").max_relative_error < 1e-5
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert "GRU" in {node.op_type for node in graph.node}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_errors_of_onnxruntime_have_a_sentence_of_ours_without_its_list(monkeypatch, tmp_path):
    assert len(_compat.onnxruntime_errors()) > 5
    monkeypatch.setitem(sys.modules, "onnxruntime.capi.onnxruntime_pybind11_state", None)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(DiffQError, match="cannot load"):
        open_session(tmp_path / "model.onnx", 1, {})


def test_a_torch_too_old_to_export_is_named_first(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    with pytest.raises(
        ExportError, match=r"needs torch 2\.9 or newer, this is torch 2\.8\.1\+cpu\. Save the converted model with save_packed"
    ):
        export_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=self.reentrant))


class OffloadsToTheCpu(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return self.second(self.first(x).relu())


@pytest.mark.parametrize("model", [Checkpointed(False), Checkpointed(True), OffloadsToTheCpu()], ids=["hooks", "reentrant", "save_on_cpu"])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_on_saved_tensors_are_seen_by_public_names_alone(model, grad):
    x = torch.randn(2, 8, requires_grad=True)
    with torch.set_grad_enabled(grad), pytest.raises(CaptureError, match="hooks on saved tensors|_NoopSaveInputs"):  # old torch
        prepare_diffq(model, x, DiffQConfig(target_bits=6, training_steps=1), scope="model")


def test_everything_works_without_any_of_the_names(monkeypatch, tmp_path):
    x = torch.randn(4, 1, 8, 8)

    def file_of_a_trained_model():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 40), nn.ReLU(), nn.Linear(40, 3))
        model = prepare_diffq(model, x, DiffQConfig(target_bits=6, training_steps=3))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        converted = convert_diffq(model)
        save_packed(converted, tmp_path / "model.dqfx")
        assert export_onnx(converted, x, tmp_path / "model.onnx").max_relative_error < 1e-5
        return converted(x)

    expected = file_of_a_trained_model()
    for name in NAMES:
        monkeypatch.setattr(_compat, name, None)
    monkeypatch.setitem(sys.modules, "onnxruntime.capi.onnxruntime_pybind11_state", None)
    assert torch.allclose(file_of_a_trained_model(), expected, atol=0.1)  # other kernels draw other noise


def test_the_package_is_imported_without_any_of_the_names():
    code = """
import importlib
import torch
found = importlib.import_module
def missing(name, *package):
    if name.startswith("torch"):
        raise ImportError(name)
    return found(name, *package)
importlib.import_module = missing
import diffq_fx
from diffq_fx import _compat
print(sorted(name for name, value in vars(_compat).items() if value is None))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(NAMES + ["__doc__"] * (_compat.__doc__ is None)))


def test_no_other_file_of_the_package_imports_a_private_name():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            else:
                continue
            found += [f"{path.name}: {name}" for name in names if PRIVATE.match(name)]
    assert found == []
