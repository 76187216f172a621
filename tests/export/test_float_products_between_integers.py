"""A weight that stays in float between integer convolutions: onnxruntime would give it int8 levels of its own at load, which saturate."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diffq_fx import convert, prepare
from diffq_fx.errors import ExportError
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.sessions import open_session
from diffq_fx.methods import LC, STE, ProductQuantization

MIDDLE = {
    "groups": (lambda: nn.Conv2d(32, 64, 1, groups=4), {"*": STE(bits=4)}),
    "excluded": (lambda: nn.Conv2d(32, 64, 1), {"0.*": STE(bits=4), "4.*": STE(bits=4)}),
    "16 bits": (lambda: nn.Conv2d(32, 64, 1), {"2.*": STE(bits=16), "*": STE(bits=4)}),
    "blocks": (lambda: nn.Conv2d(32, 64, 1), {"2.*": STE(bits=4, group_size=8), "*": STE(bits=4)}),
    "codebook": (lambda: nn.Conv2d(32, 64, 1), {"2.*": LC(entries=4), "*": STE(bits=4)}),
    "codebook of blocks": (lambda: nn.Conv2d(32, 64, 1), {"2.*": ProductQuantization(entries=16), "*": STE(bits=4)}),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(32 * 36, 64), nn.Unflatten(1, (64, 1, 1))), {"*": STE(bits=4)}),
}


def model_of(name):
    make, methods = MIDDLE[name]
    last = nn.Conv2d(64, 32, 1)
    net = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), make(), nn.ReLU(), last).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # the worst case: all levels at the ends of the range
                rows = module.weight.flatten(1).fill_(0.05)
                rows[:, :4] = -0.05
                rows.mul_(0.97 + 0.03 * torch.rand_like(rows))
    example = torch.rand(1, 32, 8, 8)
    return convert(prepare(net, example, methods)).eval(), example


@pytest.mark.parametrize("name", MIDDLE)
def test_no_weight_gets_levels_at_load(name, tmp_path):
    model, example = model_of(name)
    path = tmp_path / "model.onnx"
    result = export_onnx(model, example, path, activations="int8", calibration=[example])
    assert result.fast_relative_error < 0.02
    optimized = tmp_path / "optimized.onnx"
    open_session(path, 1, {}, optimized=optimized)
    graph = onnx.load(optimized).graph
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert "QLinearConv" in {node.op_type for node in graph.node}
    assert all(np.abs(levels.astype(int)).max(initial=0) <= 64 for levels in weights)


@pytest.mark.parametrize("name", ["groups", "excluded"])
def test_the_proof_finds_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.onnx.layout.apply.keep_in_float", lambda *_: None)
    model, example = model_of(name)
    with pytest.raises(ExportError, match=r"has no constant levels in the file: it may saturate"):
        export_onnx(model, example, tmp_path / "model.onnx", activations="int8", calibration=[example])
    assert not list(tmp_path.iterdir())
