"""A weight that stays in float between integer convolutions: onnxruntime would give it int8 levels of its own at load, which saturate."""

import numpy as np
import onnx
import pytest
import torch
from stored_models import Conv, Linear, assert_same, optimized_ops, run_exact
from torch import nn

from diffq_fx import convert, prepare
from diffq_fx.errors import ExportError
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.sessions import open_session
from diffq_fx.methods import LC, STE, ProductQuantization


class Crop(nn.Module):
    def forward(self, x):
        return x[:, :, :-1, :-1]


MIDDLE = {
    "groups": (lambda: nn.Conv2d(32, 64, 1, groups=4), {"*": STE(bits=4)}),
    "excluded": (lambda: nn.Conv2d(32, 64, 1), {"0.*": STE(bits=4), "4.*": STE(bits=4)}),
    "16 bits": (lambda: nn.Conv2d(32, 64, 1), {"2.*": STE(bits=16), "*": STE(bits=4)}),
    "blocks": (lambda: nn.Conv2d(32, 64, 1), {"2.*": STE(bits=4, group_size=8), "*": STE(bits=4)}),
    "codebook": (lambda: nn.Conv2d(32, 64, 1), {"2.*": LC(entries=4), "*": STE(bits=4)}),
    "codebook of blocks": (lambda: nn.Conv2d(32, 64, 1), {"2.*": ProductQuantization(entries=16), "*": STE(bits=4)}),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(32 * 36, 64), nn.Unflatten(1, (64, 1, 1))), {"*": STE(bits=4)}),
    "cropped": (lambda: nn.Sequential(nn.ConvTranspose2d(32, 64, 3, 2), Crop()), {"*": STE(bits=4)}),
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
    open_session(path, 1, {}, optimized_model_filepath=str(optimized))
    graph = onnx.load(optimized).graph
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert "QLinearConv" in {node.op_type for node in graph.node}
    assert all(np.abs(levels.astype(int)).max(initial=0) <= 64 for levels in weights)


@pytest.mark.parametrize("name", ["groups", "excluded", "cropped"])
def test_the_proof_finds_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.onnx.layout.apply.keep_in_float", lambda *_: None)
    model, example = model_of(name)
    with pytest.raises(ExportError, match=r"has no constant levels in the file: it may saturate"):
        export_onnx(model, example, tmp_path / "model.onnx", activations="int8", calibration=[example])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("bits", "bias", "between"), [(4, False, "pool"), (4, True, "pool"), (8, False, "pool"), (4, False, "relu")])
def test_a_product_with_blocks_behind_integers_keeps_its_kernel(bits, bias, between, verify, tmp_path):
    """onnxruntime makes an integer product of it, for which a scale for each block is one too many: the file would not run."""
    move = (
        nn.Sequential(nn.MaxPool2d(6), nn.Flatten())
        if between == "pool"
        else nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    model = nn.Sequential(
        Conv(nn.functional.conv2d, (512, 16, 3, 3), 8, name="conv"),
        move,
        Linear(512, 512, bits, group=32, ranges=32, bias=bias, name="linear"),
    ).eval()
    example, path = torch.randn(2, 16, 8, 8), tmp_path / "model.onnx"
    result = export_onnx(model, example, path, activations="int8", calibration=[example], verify=verify)
    assert [record.rule for record in result.weights] == ["int8", "linear"]
    assert "MatMulNBits" in optimized_ops(path, tmp_path)
    assert_same(run_exact(path, example), model(example), tolerance=0.02)
