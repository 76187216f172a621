"""The rule ``linear``: what onnxruntime fuses, and that it computes the same."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from stored_models import Bare, Linear, Parallel, Swapped, Tied, assert_same, levels_in, optimized_ops, run_exact, store
from torch import nn

from diffq_fx.export import export_onnx

ONE_ROW = torch.zeros(1, 512)


def check(model, example, path, tmp_path, fused=1):
    """Export, look at what onnxruntime makes of it, compare on inputs of our own. The result of the export."""
    result = export_onnx(model, example, path)
    ops = optimized_ops(path, tmp_path)
    assert ops.count("MatMulNBits") == fused, ops
    assert "DequantizeLinear" not in ops
    fresh = torch.randn(5, *example.shape[1:])
    assert_same(run_exact(path, fresh), model(fresh))
    return result


CASES = [
    *((bits, "channel", grid) for bits in (2, 3, 4, 5, 8) for grid in ("affine", "symmetric")),
    *((bits, "tensor", "affine") for bits in (2, 4, 8)),
    *((bits, group, grid) for bits, grid in ((2, "affine"), (4, "symmetric")) for group in (32, 96)),
]


def test_fused_at_every_width_and_group(path, tmp_path):
    layers = [Linear(512, 512, b, grid=grid, group=g, ranges=g, name=f"w{i}") for i, (b, g, grid) in enumerate(CASES)]
    result = check(Parallel(*layers).eval(), ONE_ROW, path, tmp_path, fused=len(CASES))
    assert result.opset == 25
    stored = levels_in(path)
    for record, (bits, _, grid) in zip(result.weights, CASES, strict=True):
        container = {2: 2, 3: 4, 4: 4, 5: 8, 8: 8}[bits]
        assert stored[f"{record.name}.levels"] == (f"{'INT' if grid == 'symmetric' else 'UINT'}{container}", (512, 512))
        assert (record.rule, record.reason, record.containers) == ("linear", None, {container: 512 * 512})


@pytest.mark.parametrize("shape", [(1, 512), (1, 3, 512), (1, 2, 3, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_rank(shape, bias, path, tmp_path):
    result = check(Linear(512, 512, 4, bias=bias).eval(), torch.zeros(shape), path, tmp_path)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert "Transpose" not in ops
    assert "Gemm" not in ops
    assert result.weights[0].rule == "linear"


@pytest.mark.parametrize(("inputs", "group"), [(500, "channel"), (515, "channel"), (520, 32), (500, 64), (515, "tensor")])
def test_blocks_that_do_not_divide_the_inputs(inputs, group, path, tmp_path):
    check(Linear(inputs, 640, 4, group=group, ranges=group).eval(), torch.zeros(1, inputs), path, tmp_path)


def test_outputs_that_do_not_fill_a_byte(path, tmp_path):
    """onnxruntime itself computes a wrong product for a fused 2-bit weight whose N is not a multiple of 4."""
    cases = [(bits, outputs) for bits in (2, 4) for outputs in (509, 510, 511, 512)]
    check(Parallel(*(Linear(512, n, b, name=f"{b}.{n}") for b, n in cases)).eval(), ONE_ROW, path, tmp_path, fused=len(cases))
    assert levels_in(path) == {f"{b}.{n}.levels": (f"UINT{b}", (512, n)) for b, n in cases}


def test_bare_matmul(path, tmp_path):
    groups = ("channel", "tensor", 32)
    branches = [Bare(512, 640, 4, group=group, ranges=group, name=str(group)) for group in groups]
    result = check(Parallel(*branches).eval(), ONE_ROW, path, tmp_path, fused=3)
    assert set(levels_in(path).values()) == {("UINT4", (512, 640))}
    assert [record.axis for record in result.weights] == [1, 1, 1]


MIXES = [([2, 4], "affine"), ([4, 8], "symmetric"), ([2, 3, 5, 8], "affine"), ([2, 8], "symmetric")]


def test_channels_of_mixed_widths_are_one_product(path, tmp_path):
    widths = [torch.tensor(bits)[torch.randint(len(bits), (512, 1))] for bits, _ in MIXES]
    layers = [Linear(512, 512, w, grid=grid, name=f"w{i}") for i, (w, (_, grid)) in enumerate(zip(widths, MIXES, strict=True))]
    example = torch.zeros(16, 512)  # at one row the 4-bit kernel alone is worth more than the bytes of [2, 4]
    result = check(Parallel(*layers).eval(), example, path, tmp_path, fused=len(MIXES))
    for record, per_channel, (bits, _) in zip(result.weights, widths, MIXES, strict=True):
        assert set(record.containers) == {2 if b == 2 else 4 if b <= 4 else 8 for b in bits}
        assert len(record.initializers) == len(record.containers)
        assert record.payload_bits == int(per_channel.sum()) * 512
        assert sum(record.containers.values()) == 512 * 512
    assert result.container_payload_bytes < 512 * 512 * (0.5 + 3)


def test_few_narrow_channels_are_not_worth_a_split(path, tmp_path):
    bits = torch.full((512, 1), 8)
    bits[0] = 2
    result = check(Linear(512, 512, bits).eval(), ONE_ROW, path, tmp_path)
    assert result.weights[0].containers == {8: 512 * 512}


@pytest.mark.parametrize("bias", [True, False])
def test_activations_between_products(bias, path, tmp_path):
    """A Relu or Clip behind a product keeps onnxruntime from fusing it."""
    activations = [nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.Hardtanh(-1, 2)]

    def pair(activation, i):
        return nn.Sequential(Linear(512, 512, 4, bias=bias, name=f"a{i}"), activation, Linear(512, 512, 4, bias=bias, name=f"b{i}"))

    branches = [pair(activation, i) for i, activation in enumerate(activations)]
    check(Parallel(*branches).eval(), ONE_ROW, path, tmp_path, fused=2 * len(branches))


def test_tied_table_is_stored_once(path, tmp_path):
    model = Tied(2000, 512, 4).eval()
    result = export_onnx(model, torch.zeros(1, 3, dtype=torch.long), path)
    ids = torch.randint(2000, (4, 3))
    assert_same(run_exact(path, ids), model(ids))
    assert levels_in(path) == {"weight.levels": ("UINT4", (512, 2000))}
    assert result.weights[0].rule == "linear+rows"
    assert result.weights[0].reason is None
    # only the rows that are asked for become float
    assert sorted(op for op in optimized_ops(path, tmp_path) if op != "Reshape") == [
        "Cast",
        "Gather",
        "Gather",
        "Gather",
        "MatMulNBits",
        "Mul",
        "Sub",
    ]


def test_weight_used_twice(path, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(512, 512, 4)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    check(Twice().eval(), ONE_ROW, path, tmp_path, fused=2)
    assert len(levels_in(path)) == 1


def test_slices_of_one_weight_are_fused_apart(path, tmp_path):
    attention = nn.MultiheadAttention(512, 8, batch_first=True)
    model = Swapped(attention, 4, need_weights=False).eval()
    query, memory = torch.zeros(1, 1, 512), torch.randn(1, 5, 512)
    export_onnx(model, (query, memory, memory), path)
    ops = optimized_ops(path, tmp_path)
    assert ops.count("MatMulNBits") == 4  # q, k, v and out_proj
    assert "DequantizeLinear" not in ops
    fresh = torch.randn(2, 1, 512), torch.randn(2, 5, 512)
    assert_same(run_exact(path, fresh[0], fresh[1], fresh[1]), model(fresh[0], fresh[1], fresh[1]))
    assert set(levels_in(path)) == {"in_proj_weight.levels", "out_proj.weight.levels"}


def test_explicit_slices(path, tmp_path):
    class Sliced(nn.Module):
        def __init__(self, *slices):
            super().__init__()
            self.slices = slices
            self.weight = store(torch.randn(512, 512), 3)

        def forward(self, x):
            weight = self.weight()
            return torch.cat([x @ weight[part].t() for part in self.slices], -1)

    model = Parallel(Sliced(slice(0, 200), slice(200, 512)), Sliced(slice(-300, None), slice(3, 7))).eval()
    check(model, ONE_ROW, path, tmp_path, fused=3)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Linear(512, 512, 4, group=8, ranges=8), "blocks of 8 inputs"),
        (Linear(512, 512, 9), "widest channel has 9"),
        (Linear(512, 512, 16), "widest channel has 16"),
        (Bare(512, 512, 4, axis=0), "scales lie along the inputs"),
        (Linear(512, 16, 4), "512 inputs and 16 outputs: fused"),
    ],
)
def test_what_cannot_or_should_not_be_fused_is_folded_and_says_why(model, reason, path, tmp_path):
    result = export_onnx(model.eval(), ONE_ROW, path)
    assert result.weights[0].rule == "fold"
    assert reason in result.weights[0].reason
    ops = optimized_ops(path, tmp_path)
    assert len(ops) == 1
    assert ops[0] in ("Gemm", "MatMul")
    fresh = torch.randn(5, 512)
    assert_same(run_exact(path, fresh), model(fresh))


def test_weight_with_many_products_is_shared_in_float(path, tmp_path):
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(512, 512, 4)

        def forward(self, x):
            for _ in range(5):
                x = torch.tanh(self.layer(x))
            return x

    result = export_onnx(Unrolled().eval(), ONE_ROW, path)
    assert "5 products read it" in result.weights[0].reason
    assert result.weights[0].rule == "fold"


def test_model_in_half_precision_is_folded(path):
    layer = Linear(512, 512, 4)
    spec = layer.weight.spec
    layer.weight.spec = dataclasses.replace(spec, dtype=torch.float16)
    layer.half()
    result = export_onnx(layer.eval(), torch.randn(1, 512).half(), path)
    assert "torch.float16" in result.weights[0].reason


def test_choice_depends_on_the_rows_of_the_example(path):
    model = Linear(384, 384, 4).eval()
    assert export_onnx(model, torch.zeros(1, 384), path).weights[0].rule == "linear"
    assert export_onnx(model, torch.zeros(64, 384), path).weights[0].rule == "fold"


def test_wrong_scale_of_one_percent_is_seen(path):
    """The comparison of this file sees it, so that the tests above mean something."""
    model = Linear(512, 512, 4).eval()
    export_onnx(model, ONE_ROW, path)
    file = onnx.load(path)
    (scale,) = [tensor for tensor in file.graph.initializer if tensor.name == "weight.scale"]
    scale.raw_data = (np.frombuffer(scale.raw_data, np.float32) * np.float32(1.01)).tobytes()
    onnx.save(file, path)
    fresh = torch.randn(5, 512)
    with pytest.raises(AssertionError, match="relative max-abs error"):
        assert_same(run_exact(path, fresh), model(fresh))
