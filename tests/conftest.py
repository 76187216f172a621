"""What every test shares: a seed, and what torch makes anew for every export."""

import copy
import functools
import gc
import importlib
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the test runner itself uses all cores

EVIDENCE = frozenset(Path(__file__).with_name("evidence.txt").read_text().splitlines())
"""The slowest tests, each beside faster ones of its kind: `make evidence` runs them, the gate does not. So it is with the mark."""


def pytest_collection_modifyitems(config, items):
    wanted = bool(os.environ.get("DIFFQ_FX_EVIDENCE"))
    is_evidence = {item: item.nodeid in EVIDENCE or item.get_closest_marker("evidence") is not None for item in items}
    left = [item for item in items if is_evidence[item] != wanted]
    if left and len(items) > 1:  # one test that is asked for by its name runs
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if is_evidence[item] == wanted]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_look_at():
    """compress and torch's exporters collect garbage: of millions of objects, which thousands of tests and imports leave, that takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch):
    """What holds for the C kernels and for torch's own operations."""
    from diffq_fx.kernels import extension

    if request.param == "torch":
        monkeypatch.setattr(extension, "kernels", lambda: None)
    elif extension.kernels() is None:
        pytest.skip("the kernels are not built")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _torch_looks_up_its_operators_once():
    """Of the export of a small model more than half goes into a table of torch's translations to ONNX, the same every time."""
    try:
        registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        utils = importlib.import_module("torch._export.utils")
        of_opset, materialize = registry.from_torchlib, utils._materialize_cpp_cia_ops
    except (ImportError, AttributeError):  # another version of torch, which takes its time
        yield
        return
    kept = functools.cache(of_opset)

    def from_torchlib(*opset, **named):
        made = copy.copy(kept(*opset, **named))
        made.functions = {name: list(ways) for name, ways in made.functions.items()}  # an export adds its own in front
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(materialize))
        yield


TOO_OLD_TO_EXPORT = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip, with the sentence that users read, what this torch is too old to export."""
    try:
        return (yield)
    except BaseException as error:  # pytest.raises and pytest.warns fail with one of their own
        if TOO_OLD_TO_EXPORT and any("export_onnx: needs torch" in str(each) for each in (error, error.__context__)):
            pytest.skip(f"export_onnx needs torch 2.9, this is {torch.__version__}")
        raise
