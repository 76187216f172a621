"""Export every model of the zoo that torch can export: the export's own check passes, and the file holds no float copy of a weight."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diffq_fx import DiffQWarning, ExportError
from diffq_fx.export import export_onnx
from zoo.checks import trained
from zoo.entry import Entry, parameters_of
from zoo.models import BY_NAME, ZOO

MODULE_SCOPE = ["lstm_lm-module", "mha-module", "transformer_encoder-module", "tied-module", "bare_parameters-module", "unet2d-module"]
EXPORTED = [entry for entry in ZOO if not entry.no_onnx] + [BY_NAME[name] for name in MODULE_SCOPE]


def _example(entry: Entry) -> Any:
    args, kwargs = entry.example()
    return kwargs or args


def _export(entry: Entry, path: Path, layout: Any = "onnxruntime") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffQWarning)  # tiny layers: what is not fused, and a batch that the model fixes
        return export_onnx(trained(entry)[1], _example(entry), path, layout=layout)


SLOWEST = frozenset("resnet18 rnn_cells demucs causal_attention llama qwen3_moe vit".split())
"""Other tests of the gate export models of their kind."""


@pytest.mark.parametrize("entry", parameters_of(EXPORTED, SLOWEST))
def test_exports_and_computes_the_same(entry: Entry, tmp_path: Path):
    model = trained(entry)[0]
    result = _export(entry, tmp_path / "model.onnx")
    assert len(result.weights) == entry.weights
    assert result.max_abs_error is not None
    assert result.max_abs_error < 1e-4
    _assert_no_float_weight(tmp_path / "model.onnx", model)


@pytest.mark.parametrize("name", ["resnet20_cifar", "lstm_lm", "mha", "tied", "bare_parameters", "unet2d"])
def test_exports_a_plain_dequantize_for_other_runtimes(name: str, tmp_path: Path):
    entry = BY_NAME[name]
    result = _export(entry, tmp_path / "model.onnx", layout="qdq")
    assert result.max_abs_error is not None
    assert result.max_abs_error < 1e-4
    _assert_no_float_weight(tmp_path / "model.onnx", trained(entry)[0])


def _assert_no_float_weight(path: Path, model: nn.Module) -> None:
    """No float tensor of the file has the values of a weight, in whatever shape and order."""
    floats = [
        onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    ]
    by_size: dict[int, list[np.ndarray]] = {}
    for array in floats:
        by_size.setdefault(array.size, []).append(np.sort(array, axis=None))
    for quantizer in model.compression.quantizers:
        weight = model.get_parameter(quantizer.spec.name).detach()
        for values in (weight, quantizer.rounded_weight(weight)):
            if values.unique().numel() >= 4:
                wanted = np.sort(values.numpy(), axis=None)
                assert not any(np.array_equal(array, wanted) for array in by_size.get(wanted.size, [])), quantizer.spec.name


@pytest.mark.parametrize("entry", parameters_of([entry for entry in ZOO if entry.no_onnx not in ("", "chance")]))
def test_refuses_what_no_file_can_hold(entry: Entry, tmp_path: Path):
    """Where torch refuses the float model there is nothing to compare with; else the export's own check must see the difference."""
    with pytest.raises(ExportError):
        _export(entry, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
    if entry.no_onnx in ("state", "random"):
        return
    args, kwargs = entry.example()
    with pytest.raises(Exception):  # noqa: B017, PT011  torch's errors have no common class
        torch.onnx.export(entry.make().eval(), args, kwargs=kwargs, dynamo=True)
    pytest.skip(f"torch.onnx.export does not take the float model ({entry.no_onnx})")
