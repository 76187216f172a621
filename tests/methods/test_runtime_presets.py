"""Presets by runtime: one table, weights that each of them holds as they are learned, and what it cannot hold refused at once."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, PreparationError, bits_report, convert, prepare, prepare_diffq
from diffq_fx.export.onnx.options import RUNTIMES as ONNX_RUNTIMES
from diffq_fx.export.onnx.options import layout_and_container
from diffq_fx.methods import STE
from diffq_fx.parts import stored_weights
from diffq_fx.runtimes import RUNTIMES

LEARNING = [name for name, runtime in RUNTIMES.items() if len(runtime.preset()["widths"]) > 1]
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def net(inputs=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 96), nn.Tanh(), nn.Linear(96, 32))


def trained(method):
    model = prepare(net(), X, method)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def test_one_table_of_runtimes():
    assert {name: RUNTIMES[name].onnx_options for name in ONNX_RUNTIMES} == ONNX_RUNTIMES
    for runtime in RUNTIMES.values():
        for grid, widths in runtime.widths.items():
            assert min(widths) == runtime.onnx_options.get("min_container", min(widths))
            assert runtime.preset(grid)["widths"] == widths


@pytest.mark.parametrize("runtime", LEARNING)
def test_presets_meet_their_size_and_hold_one_width_a_weight(runtime):
    model = trained(DiffQConfig.for_runtime(runtime, target_bits=6, training_steps=4))
    compression = model.compression
    assert compression.exact_bits() - compression.rest_bits <= compression.budget_bits()
    for _, weight in stored_weights(convert(model)):
        assert weight.bits.numel() == 1
        assert int(weight.bits) in RUNTIMES[runtime].widths[weight.spec.grid]
        assert weight.scale.dtype == torch.float16
        assert weight.scale.shape == (weight.spec.rows, weight.spec.columns // 32)


@pytest.mark.parametrize("grid", ["symmetric", "float"])
def test_gguf_blocks_by_hand(grid):
    """What llama.cpp makes of a block: ``d (q - 2^(b-1))`` of Q4_0, Q5_0 and Q8_0, ``d q + m`` of Q4_1 and Q5_1, d and m of float16."""
    converted = convert(trained(DiffQConfig.for_runtime("gguf", grid=grid, target_bits=5.8, training_steps=4)))
    for _, weight in stored_weights(converted):
        blocks = weight.levels_OI().numpy().reshape(-1, 32)
        bits, d = int(weight.bits), weight.scale.numpy().reshape(-1, 1).astype(np.float32)
        if grid == "symmetric":
            q = (blocks - 2 ** (bits - 1)).astype(np.int8)
            values = q.astype(np.float32) * d
        else:
            values = blocks.astype(np.float32) * d + weight.offset.numpy().reshape(-1, 1).astype(np.float32)
        assert np.array_equal(values.reshape(weight.spec.shape), weight().numpy())


def test_a_preset_beside_a_fixed_width():
    rest = DiffQConfig.for_runtime("gguf", target_bits=5, training_steps=4)
    model = trained({"2": STE(bits=8, group_size=32, grid="symmetric", scale_dtype="float16"), "*": rest})
    bits = [int(weight.bits) for _, weight in stored_weights(convert(model))]
    assert bits[0] in (4, 5, 8)
    assert bits[1] == 8


@pytest.mark.parametrize(
    ("runtime", "settings", "message"),
    [
        ("vllm", {}, r"runtime must be one of \('onnxruntime', 'web', 'openvino', 'onnxruntime-genai', 'gguf'\), got 'vllm'"),
        ("ort-format", {}, r"the runtime 'ort-format' has 8 bits alone and no width to learn. Use STE\(bits=8\)"),
        ("gguf", {"widths": (3, 4)}, r"the runtime 'gguf' has widths of \(4, 5, 8\) on the symmetric grid, got \(3, 4\)"),
        ("gguf", {"grid": "float", "widths": (4, 8)}, r"widths of \(4, 5\) on the float grid, got \(4, 8\)"),
        ("gguf", {"grid": "affine"}, "the runtime 'gguf' has grid of 'symmetric' or 'float', got 'affine'"),
        ("gguf", {"range_per": 64}, "the runtime 'gguf' has range_per of 32, got 64"),
        ("gguf", {"scale_dtype": "float32"}, "the runtime 'gguf' has scale_dtype of 'float16', got 'float32'"),
        ("gguf", {"group_size": "channel"}, "the runtime 'gguf' has group_size of 'tensor', got 'channel'"),
        ("gguf", {"target_mib": 1, "size_of": "onnx_file", "widths": (4, 8)}, "has size_of of 'widths', got 'onnx_file'"),
        ("openvino", {"widths": (2, 4)}, r"the runtime 'openvino' has widths of \(4, 8\)"),
        ("onnxruntime-genai", {"range_per": "channel"}, "has range_per of 16 or 32 or 64 or 128, got 'channel'"),
        ("onnxruntime", {"widths": (2, 3)}, r"the runtime 'onnxruntime' has widths of \(2, 4, 8\)"),
        ("gguf", {"min_bits": 3}, r"has widths of \(4, 5, 8\) on the symmetric grid, got min_bits=3"),
        ("gguf", {"max_bits": 16}, r"has widths of \(4, 5, 8\) on the symmetric grid, got max_bits=16"),
        ("onnxruntime", {"min_bits": 3, "widths": (4, 8)}, r"has widths of \(2, 4, 8\) on the affine grid, got min_bits=3"),
        ("web", {"range_per": 24}, "the runtime 'web' has range_per of 16 or 32"),
    ],
    ids=str,
)
def test_what_a_runtime_cannot_hold_is_refused(runtime, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffQConfig.for_runtime(runtime, **settings)


def test_a_change_of_a_preset_is_refused_too():
    for change in ({"widths": (6, 8)}, {"min_bits": 3.0}):
        with pytest.raises(ValueError, match="the runtime 'gguf' has widths of"):
            dataclasses.replace(DiffQConfig.for_runtime("gguf"), **change)


@pytest.mark.parametrize("runtime", LEARNING)
@pytest.mark.parametrize("settings", [{}, {"init_bits": 4.5}, {"min_bits": 4, "widths": (4, 8)}, {"max_bits": 8}], ids=str)
def test_limits_that_a_runtime_has_stay_through_a_change(runtime, settings):
    config = DiffQConfig.for_runtime(runtime, **settings)
    assert dataclasses.replace(config, target_bits=6).limits == config.limits


@pytest.mark.parametrize(("runtime", "settings"), [*((name, {}) for name in LEARNING), ("gguf", {"grid": "float"})])
def test_a_preset_without_a_target_has_one_in_reach(runtime, settings):
    config = DiffQConfig.for_runtime(runtime, training_steps=2, **settings)
    prepared = prepare_diffq(net(), X, config)
    assert bits_report(prepared).average_bits_in_all <= config.target_bits <= 5.5
    assert DiffQConfig.for_runtime(runtime, target_mib=1.0, **settings).target_bits is None


def test_advice_where_a_target_cannot_be_reached_can_be_followed():
    with pytest.raises(ValueError, match=r"take from 4\.5.* to 8\.5") as error:
        prepare_diffq(net(), X, DiffQConfig.for_runtime("gguf", target_bits=4))
    said = str(error.value).splitlines()[1].strip()
    assert said == "Give a target between these. They are those of 'gguf', for its widths and the inputs that share a scale (range_per)."
    with pytest.raises(ValueError, match=r"Give a target between these\. Of a DiffQConfig, min_bits, max_bits and larger groups"):
        prepare_diffq(net(), X, DiffQConfig(target_bits=1.01))


def test_advice_for_a_weight_names_what_this_runtime_has():
    with pytest.raises(PreparationError, match=r"whole blocks of 32 inputs, and its rows have 48\. Give the DiffQConfig range_per=16\.$"):
        prepare_diffq(net(48), torch.zeros(1, 48), DiffQConfig.for_runtime("onnxruntime-genai", target_bits=6))
    with pytest.raises(PreparationError, match=r"rows have 100.*if it is an embedding or a head, else use the runtime \"onnxruntime\""):
        prepare_diffq(net(100), torch.zeros(1, 100), DiffQConfig.for_runtime("onnxruntime-genai", target_bits=6))
    with pytest.raises(PreparationError, match=r"rows have 48\. Leave it in float by exclude=\('0.weight',\)\.$"):
        prepare_diffq(net(48), torch.zeros(1, 48), DiffQConfig.for_runtime("gguf", target_bits=6))


@pytest.mark.parametrize(
    ("runtime", "model", "x", "message"),
    [
        (
            "gguf",
            net(100),
            torch.zeros(1, 100),
            "'0.weight' of shape .*whole blocks of 32 inputs, and its rows have 100. Leave it in float by",
        ),
        ("onnxruntime-genai", net(100), torch.zeros(1, 100), "'0.weight' of shape .*whole blocks of 32 inputs, and its rows have 100"),
        (
            "gguf",
            nn.Sequential(nn.Conv2d(32, 4, 1)),
            torch.zeros(1, 32, 2, 2),
            "'0.weight' of shape .*: the runtime 'gguf' has matrices alone",
        ),
    ],
)
def test_a_weight_that_a_runtime_cannot_hold_is_refused_by_prepare(runtime, model, x, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = DiffQConfig.for_runtime(runtime, target_bits=6)
    with pytest.raises(PreparationError, match=message):
        prepare_diffq(model, x, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if len(model) > 1:
        prepared = prepare_diffq(model, x, dataclasses.replace(config, exclude=("0.weight",)))
        assert [quantizer.spec.name for quantizer in prepared.compression.quantizers] == ["2.weight"]


class Experts(nn.Module):
    """Four experts in one tensor."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 64, 64) / 8)

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.experts).mean(1)


@pytest.mark.parametrize("runtime", ["gguf", "onnxruntime-genai", "onnxruntime", "openvino"])
def test_experts_in_one_tensor_are_held_or_refused_in_one_sentence(runtime):
    model, x, config = Experts(), torch.zeros(1, 64), DiffQConfig.for_runtime(runtime, target_bits=6)
    if runtime in ("onnxruntime", "openvino"):
        spec = prepare_diffq(model, x, config).compression.quantizers[0].spec
        assert (spec.bits_layout.num_groups, spec.scale_layout.num_groups) == (1, 4 * 64 * 64 // 32)
        return
    with pytest.raises(
        PreparationError, match=rf"weight 'experts' of shape \(4, 64, 64\): the runtime '{runtime}' .* no experts in one tensor"
    ):
        prepare_diffq(model, x, config)


def test_blocks_that_do_not_divide_are_shorter_where_the_runtime_takes_them():
    prepared = prepare_diffq(net(100), torch.zeros(1, 100), DiffQConfig.for_runtime("openvino", target_bits=6))
    assert prepared.compression.quantizers[0].spec.scale_layout.shape == (96, 4)


def test_export_onnx_names_the_function_that_writes_for_another_runtime():
    with pytest.raises(ValueError, match="got 'gguf'. Its files are written by diffq_fx.export.gguf.export_gguf"):
        layout_and_container("gguf", None, None)
