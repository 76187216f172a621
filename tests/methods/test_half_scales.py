"""Scales that are values of float16, as runtimes of language models hold them: trained, counted, converted and stored as such."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, PreparationError, bits_report, convert, functional, prepare, prepare_diffq
from diffq_fx.export import export_onnx, load_packed, save_packed
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.methods import STE
from diffq_fx.parts import stored_weights

X = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
LAYOUT = {"group_size": "tensor", "range_per": 32, "scale_dtype": "float16"}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 64), nn.Tanh(), nn.Linear(64, 24))  # the last block of a row of 100 is shorter


def trained(method, steps=12):
    model = prepare(net(), X, method)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


METHODS = {
    "symmetric": DiffQConfig(target_bits=6, widths=(4, 5, 8), grid="symmetric", training_steps=12, **LAYOUT),
    "affine": DiffQConfig(target_bits=5, widths=(2, 4, 8), grid="affine", training_steps=12, **LAYOUT),
    "half": DiffQConfig(target_bits=3, max_bits=4, training_steps=12, **LAYOUT),
    "float": DiffQConfig(target_bits=6.5, widths=(4, 5, 8), grid="float", training_steps=12, **LAYOUT),
    "noise to the end, no clipping": DiffQConfig(penalty=1e-2, clip_ranges=False, **LAYOUT),
    "a width for each channel": DiffQConfig(target_bits=5, grid="affine", range_per=32, scale_dtype="float16"),
    "fixed": {"0": STE(bits=8, group_size=32, grid="symmetric", scale_dtype="float16"), "*": DiffQConfig(grid="affine", **LAYOUT)},
}


@pytest.fixture(scope="module", params=METHODS)
def pair(request):
    model = trained(METHODS[request.param])
    return model, convert(model)


def test_what_is_trained_is_what_is_stored(pair, tmp_path):
    model, converted = pair
    weights = [weight for _, weight in stored_weights(converted)]
    assert torch.equal(converted(X), model(X))
    for weight in weights:
        assert weight.scale.dtype == torch.float16
        assert weight.scale.shape == (weight.spec.rows, -(-weight.spec.columns // 32))
        assert weight.offset is None or weight.offset.dtype == torch.float16
        layout, levels = weight.spec.scale_layout, weight.levels_OI().numpy().astype(np.float32)
        scale, offset, zero_point = (
            None if v is None else layout.expand(v.float()).numpy() for v in (weight.scale, weight.offset, weight.zero_point)
        )
        by_hand = levels * scale + offset if zero_point is None else (levels - zero_point) * scale
        assert np.array_equal(weight().numpy(), by_hand)
    save_packed(converted, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[weight.spec.name], weight()) for weight in weights)


def test_the_size_counts_16_bits(pair):
    model, converted = pair
    target = model.compression.config.target_bits
    report = bits_report(converted)
    assert target is None or report.average_bits_in_all <= target or len(model.compression.fixed)
    for _, weight in stored_weights(converted):
        spec, found = weight.spec, weight.footprint()
        zero_points = spec.scale_layout.counts() * 0 + weight.bits * (spec.grid in ("affine", "half")) + (spec.grid == "half")
        assert found.scale_bits == 16 * (weight.scale.numel() * (1 if weight.offset is None else 2)) + int(zero_points.sum()) + 8


@pytest.mark.parametrize(
    ("bits", "grid", "layout"), [(4, "symmetric", "onnxruntime"), (4, "affine", "qdq"), (8, "affine", "qdq"), (2, "half", "qdq")]
)
def test_the_onnx_file_holds_float16_scales_and_fused_products_read_them(bits, grid, layout, tmp_path):
    method = STE(bits=bits, grid=grid, group_size=32, scale_dtype="float16")
    converted, path, seen = (
        convert(prepare(nn.Linear(768, 1024), torch.zeros(1, 768), method)),
        tmp_path / "model.onnx",
        tmp_path / "seen.onnx",
    )
    export_onnx(converted, torch.randn(1, 768), path, layout=layout)  # its own check compares the outputs
    scales = [each for each in onnx.load(path).graph.initializer if each.name.endswith(".scale")]
    assert [each.data_type for each in scales] == [onnx.TensorProto.FLOAT16]
    by_two = 1 + (grid == "half")  # levels and zero points are doubled there, so that all are integers
    expected = converted.weight_quantized.scale.numpy() / by_two
    assert np.array_equal(np.sort(onnx.numpy_helper.to_array(scales[0]).ravel()), np.sort(expected.ravel()))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(seen)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert "MatMulNBits" in [node.op_type for node in onnx.load(seen).graph.node]


@pytest.mark.parametrize("grid", ["affine", "half", "symmetric", "float"])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 3e4, 6.5e4])
def test_scales_of_all_sizes(size, grid):
    rows, layout, bits = torch.linspace(-1, 0.7, 32).view(1, 32) * size, GroupLayout.of(1, 32, "channel"), torch.tensor([[4]])
    params = functional.quant_params(*functional.grid_range(*layout.aminmax(rows), grid), bits, grid, torch.float16)
    for values in (params.scale, params.offset):
        assert values is None or torch.equal(values.half().to(values.dtype), values)
    rounded = functional.dequantize(functional.quantize(rows, params, bits, layout), params, layout)
    assert rounded.isfinite().all()
    coarse = 2**-24  # half of float16's least step: smaller ranges are rounded to it, or to nothing
    assert (rounded - rows).abs().max() <= (0.52 * 1.7 / 15 + 2**-11 + 1 / 15 * (grid == "symmetric")) * size + 16 * coarse


def test_a_weight_that_float16_scales_are_too_coarse_for_is_refused():
    layer = nn.Linear(64, 64)
    nn.init.uniform_(layer.weight, -1e-6, 1e-6)
    method = STE(bits=4, group_size=32, scale_dtype="float16")
    with pytest.raises(
        PreparationError, match=r"weight 'weight' has no value larger than 1e-06, and scales of torch.float16 are too coarse"
    ):
        prepare(layer, torch.zeros(1, 64), method)
    with torch.no_grad():
        layer.weight.mul_(10)
    stored = convert(prepare(layer, torch.zeros(1, 64), method))
    assert stored(torch.eye(64)).isfinite().all()
    nn.init.zeros_(layer.weight)
    prepare(layer, torch.zeros(1, 64), method)


def test_a_weight_that_float16_scales_do_not_reach_is_refused():
    layer = nn.Linear(64, 4)
    with torch.no_grad():
        layer.weight[1, 3] = -7e4
    with pytest.raises(PreparationError, match=r"weight 'weight' has a value of size 7e\+04, and scales of torch.float16 reach 65504"):
        prepare_diffq(layer, torch.zeros(1, 64), DiffQConfig(**LAYOUT))
    prepare_diffq(layer, torch.zeros(1, 64), DiffQConfig(target_bits=6, group_size="tensor", range_per=32))
