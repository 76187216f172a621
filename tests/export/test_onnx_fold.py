"""The rule ``fold``: nothing of the weight is left to compute at run time, whatever reads it and however it is divided."""

import onnx
import pytest
import torch
from stored_models import Conv, Linear, Parallel, Swapped, Tied, assert_same, levels_in, optimized_ops, run_exact, store
from torch import nn
from torch.nn import functional as F

from diffq_fx.export import export_onnx

WEIGHT_MATHS = {"Cast", "Sub", "Mul", "DequantizeLinear", "Expand", "Reshape", "Transpose", "Slice", "Concat"}


def check(model, example, path, tmp_path):
    result = export_onnx(model, example, path)
    left = WEIGHT_MATHS & set(optimized_ops(path, tmp_path))
    assert not left, f"computed at every run: {left}"
    fresh = torch.randn(5, *example.shape[1:])
    assert_same(run_exact(path, fresh), model(fresh))
    assert all(record.rule == "fold" and record.reason for record in result.weights)
    return result


GROUPS = ["channel", "tensor", 32, 8, 7]


@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_conv_at_every_width_and_group(grid, path, tmp_path):
    widths = (2, 3, 4, 5, 8, 9, 16) if grid == "symmetric" else (1, 2, 3, 4, 5, 8, 9, 16)  # one symmetric bit holds -1 and 0
    cases = [(bits, "channel") for bits in widths] + [(4, group) for group in GROUPS[1:]]
    branches = [Conv(F.conv1d, (6, 10, 3), b, name=f"{b}.{g}", group=g, ranges=g, grid=grid) for b, g in cases]
    result = check(Parallel(*branches).eval(), torch.randn(1, 10, 9), path, tmp_path)
    sign = "INT" if grid == "symmetric" else "UINT"
    stored = levels_in(path)
    for record, (bits, _) in zip(result.weights, cases, strict=True):
        container = next(c for c in (2, 4, 8, 16) if c >= bits)
        assert stored[f"{record.name}.levels"][0] == f"{sign}{container}"
        assert record.container_bits == container
    assert "Conv" in result.weights[0].reason


def test_other_convolutions(path, tmp_path):
    branches = [
        Conv(F.conv_transpose1d, (10, 5, 3), 4, axis=1, name="transposed"),
        Conv(F.conv_transpose1d, (10, 5, 3), 3, axis=1, name="transposed blocks", group=8, ranges=8),
        Conv(lambda x, w: F.conv1d(x, w, groups=10), (10, 1, 3), 4, name="depthwise"),
    ]
    check(Parallel(*branches).eval(), torch.randn(1, 10, 9), path, tmp_path)


def test_conv2d_with_batch_norm(path, tmp_path):
    model = nn.Sequential(Conv(F.conv2d, (8, 3, 3, 3), 4), nn.BatchNorm2d(8), nn.ReLU())
    model(torch.randn(4, 3, 8, 8))
    check(model.eval(), torch.randn(1, 3, 8, 8), path, tmp_path)
    assert optimized_ops(path, tmp_path).count("BatchNormalization") == 0


def test_embedding_and_small_tied_head(path, tmp_path):
    model = Tied(50, 16, 4).eval()
    result = export_onnx(model, torch.randint(50, (1, 3)), path)
    assert not {"DequantizeLinear", "Cast", "Sub", "Mul"} & set(optimized_ops(path, tmp_path))
    ids = torch.randint(50, (4, 3))
    assert_same(run_exact(path, ids), model(ids))
    assert list(levels_in(path).values()) == [("UINT4", (50, 16))]
    assert result.weights[0].rule == "fold"


@pytest.mark.parametrize(
    "module", [nn.LSTM(12, 8, 2, bidirectional=True, batch_first=True), nn.GRU(12, 8, batch_first=True), nn.RNN(12, 8, batch_first=True)]
)
def test_recurrent_layers(module, path, tmp_path):
    model = Swapped(module, 4).eval()
    example = torch.randn(3, 5, 12)
    result = export_onnx(model, example, path)
    assert_same(run_exact(path, example), model(example))
    if type(module) is not nn.RNN:  # which torch.onnx writes as one product per step
        assert all(f"read by {type(module).__name__}" in record.reason for record in result.weights)
    assert not {"DequantizeLinear", "Cast", "Sub"} & set(optimized_ops(path, tmp_path))


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_of_mixed_widths_are_split(axis, path, tmp_path):
    bits = torch.tensor([2, 4, 8, 16])[torch.randint(4, (64, 1))]
    shape, function = ((64, 32, 5), F.conv1d) if axis == 0 else ((32, 64, 5), F.conv_transpose1d)
    model = Conv(function, shape, bits, axis=axis).eval()
    result = check(model, torch.randn(1, 32, 9), path, tmp_path)
    (record,) = result.weights
    assert set(record.containers) == {2, 4, 8, 16}
    expected = sum(int((bits == b).sum()) * 160 * b for b in (2, 4, 8, 16))
    assert record.payload_bits == record.container_payload_bits == expected


def test_bits_per_block_inside_a_row(path, tmp_path):
    layer = nn.Linear(40, 24)
    bits = torch.randint(1, 9, (24, 5))
    model = Parallel(*(Bare(store(layer.weight, bits, name=grid, group=8, ranges=8, grid=grid)) for grid in ("affine", "symmetric")))
    check(model.eval(), torch.randn(1, 40), path, tmp_path)


class Bare(nn.Module):
    def __init__(self, stored):
        super().__init__()
        self.stored = stored

    def forward(self, x):
        return F.linear(x, self.stored())


def test_constant_weight(path, tmp_path):
    check(Bare(store(torch.full((4, 6), 0.25), 4)).eval(), torch.randn(1, 6), path, tmp_path)


def test_weight_that_is_an_output(path):
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.stored = store(torch.randn(4, 6), 4)

        def forward(self, x):
            return x @ self.stored().t(), self.stored()

    model = Gives().eval()
    result = export_onnx(model, torch.randn(2, 6), path)
    assert "output" in result.weights[0].reason
    assert_same(run_exact(path, torch.randn(2, 6))[1], model(torch.randn(2, 6))[1])


def test_one_percent_is_seen(path):
    model = Linear(16, 8, 4).eval()
    export_onnx(model, torch.randn(2, 16), path)
    file = onnx.load(path)
    (scale,) = [tensor for tensor in file.graph.initializer if tensor.name == "weight.scale"]
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 1.01, scale.name))
    onnx.save(file, path)
    fresh = torch.randn(5, 16)
    with pytest.raises(AssertionError, match="relative max-abs error"):
        assert_same(run_exact(path, fresh), model(fresh))


def test_folded_file_is_much_smaller_than_float(path, tmp_path):
    model = Conv(F.conv2d, (64, 64, 3, 3), 4).eval()
    result = check(model, torch.randn(1, 64, 5, 5), path, tmp_path)
    assert result.file_bytes < 64 * 64 * 9 * 4 / 7
    assert result.payload_bytes == result.container_payload_bytes == 64 * 64 * 9 / 2
