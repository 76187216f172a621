"""Half-integer zero points: the file keeps the learned bits, and every form computes with exactly the weights that PyTorch has."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from saturating import MACHINES, run_on
from stored_models import Bare, Conv, Linear, Parallel, Swapped, Tied, assert_same, levels_in, optimized, optimized_ops, run_exact, store
from torch import nn
from torch.nn import functional as F

from diffq_fx.errors import ExportError
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.inspection import inspect_onnx
from diffq_fx.export.onnx.integer_products import find_products
from diffq_fx.export.onnx.layout.products import MAX_INPUTS, choose_form, is_exact
from diffq_fx.export.onnx.layout.table import one_container, read_table, split_by_width

pytestmark = pytest.mark.filterwarnings("ignore:export_onnx. rounding activations changes")

MIXED_PAIR = torch.tensor([1, 2])[torch.arange(1024) % 2][:, None]
MIXED = torch.tensor([1, 2, 3, 8])[torch.arange(24) % 4][:, None]
NARROW_AND_WIDE = torch.tensor([2, 2, 5, 12])[torch.arange(24) % 4][:, None]
CASES = [
    *((bits, group) for bits in (1, 2, 3, 4) for group in ("channel", "tensor", 7)),
    (MIXED, "channel"),
    (NARROW_AND_WIDE, "channel"),
    (torch.arange(24 * 4).reshape(24, 4) % 5 + 1, 8),
]


def half(weight, bits, **kwargs):
    """Integers on the grid "half", about every third zero point an integer and the others half-integers, where the width has such."""
    stored = store(weight, bits, **{"grid": "half", **kwargs})
    top = 2 ** stored.bits.float().expand(stored.scale.shape) - 1
    number = torch.arange(top.numel()).reshape(top.shape)
    choices = torch.stack([top / 2, top - 0.5, (top / 2).floor()])  # centred, beside one end, whole
    stored.zero_point = choices.gather(0, torch.where(top < 16, number % 3, 2)[None])[0]
    return stored


class Gives(nn.Module):
    """A weight as an output: what the graph has made of the integers."""

    def __init__(self, bits, group, *, shape=(24, 30), **kwargs):
        super().__init__()
        self.weight = half(torch.randn(shape), bits, group=group, ranges=group, **kwargs)

    def forward(self, x):
        return self.weight() + x.sum()


def exactly(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one), other.detach().numpy())


@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
def test_weights_are_the_same_bit_by_bit(layout, path):
    branches = [Gives(bits, group, name=f"w{i}") for i, (bits, group) in enumerate(CASES)]
    branches += [Gives(2, "channel", shape=(6, 4, 3), name="conv"), Gives(2, "channel", shape=(4, 6, 3), axis=1, name="transposed")]
    model, zero = Parallel(*branches).eval(), torch.zeros(2)
    result = export_onnx(model, zero, path, layout=layout)
    expected = model(zero)
    exactly(ReferenceEvaluator(str(path)).run(None, {"inputs_0": zero.numpy()}), expected)
    exactly(run_exact(path, zero), expected)
    assert {record.grid for record in result.weights} == {"half"}


@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
@pytest.mark.parametrize(("bits", "container"), [(1, 2), (2, 2), (3, 4), (4, 4)])
def test_the_file_keeps_the_smallest_container_and_fuses(bits, container, layout, path, tmp_path):
    size, choice = {}, {}
    for grid in ("half", "affine"):
        model = Linear(512, 512, bits, grid=grid).eval()
        model.weight = half(torch.randn(512, 512), bits) if grid == "half" else model.weight
        result = export_onnx(model, torch.randn(1, 512), path, layout=layout)
        assert levels_in(path) == {"weight.levels": (f"UINT{container}", (512, 512))}
        assert result.weights[0].containers == {container: 512 * 512}
        ops = optimized_ops(path, tmp_path)
        assert ops.count("MatMulNBits") == 1
        assert not {"DequantizeLinear", "Mul", "Cast", "Where"} & set(ops), "done when the file is loaded, not at every run"
        assert_same(run_exact(path, fresh := torch.randn(5, 512)), model(fresh))
        size[grid] = path.stat().st_size
        remarks = " ".join(result.weights[0].remarks)
        assert ("half-integer zero points" in remarks) == (grid == "half" and bits in (2, 4))
        choice[grid] = result.weights[0].choice
    assert choice["half"] == choice["affine"], "no form of a product is lost"
    assert size["half"] - size["affine"] < 512 * 6 / 8 + 700, "wider zero points and a factor a channel, and a few nodes"


NATIVE = [(1, "channel"), (2, "channel"), (4, "channel"), (2, 128), (2, "tensor"), (MIXED_PAIR, "channel")]


def test_kernels_of_the_learned_width_round_zero_points_down_and_subtract_what_that_adds(path, tmp_path):
    layers = [Linear(1024, 1024, 2, name=f"w{i}") for i in range(len(NATIVE))]
    for layer, (bits, group) in zip(layers, NATIVE, strict=True):
        layer.weight = half(torch.randn(1024, 1024), bits, group=group, ranges=group, name=layer.weight.spec.name)
    model = Parallel(*layers[:-1], nn.Sequential(layers[-1], nn.ReLU())).eval()
    result = export_onnx(model, torch.randn(1, 1024), path)
    kernels = [node for node in optimized(path, tmp_path).node if node.op_type == "MatMulNBits"]
    widths = [next(a.i for a in node.attribute if a.name == "bits") for node in kernels]
    assert sorted(widths) == [2, 2, 2, 2, 2, 4]
    ops = optimized_ops(path, tmp_path)
    assert not {"DequantizeLinear", "Mul", "Cast", "Where", "Expand"} & set(ops), "done when the file is loaded, not at every run"
    assert ["round them down" in " ".join(record.remarks) for record in result.weights] == [False, True, True, True, True, True]
    fresh = torch.rand(3, 1024) + 0.5  # far from zero: sums that are as large as they come
    assert_same(run_exact(path, fresh), model(fresh))
    roles = {tensor.role for tensor in inspect_onnx(path).tensors if tensor.name.endswith(".halves")}
    assert roles == {"other"}


def test_two_bits_stay_two_where_onnxruntime_misreads_such_containers(path):
    """It reads bytes here: doubled levels, see :data:`TWO_BIT_ALIGNMENT`."""
    model = Linear(64, 47, 2).eval()
    model.weight = half(torch.randn(47, 64), 2)
    export_onnx(model, torch.randn(1, 64), path, layout="qdq")
    assert levels_in(path) == {"weight.levels": ("UINT2", (64, 47))}
    assert_same(run_exact(path, fresh := torch.randn(5, 64)), model(fresh))


@pytest.mark.parametrize(("bits", "factors"), [(2, 0), (torch.tensor([2, 5])[torch.arange(48) % 2][:, None], 1)])
def test_one_number_doubles_a_weight_of_one_width(bits, factors, path):
    model = Linear(64, 48, 2).eval()
    model.weight = half(torch.randn(48, 64), bits)
    export_onnx(model, torch.randn(1, 64), path)
    assert len([tensor for tensor in onnx.load(path).graph.initializer if "factor" in tensor.name]) == factors


def test_whole_zero_points_need_nothing(path):
    model = Linear(64, 48, 2, grid="half").eval()
    model.weight.zero_point = model.weight.zero_point.round()
    table = read_table(model.weight)
    assert table.factor is None
    assert np.array_equal(table.zero_point, model.weight.zero_point.int().numpy())
    assert not export_onnx(model, torch.randn(1, 64), path).weights[0].remarks


@pytest.mark.parametrize("make", [one_container, split_by_width])
@pytest.mark.parametrize(("bits", "group"), CASES)
def test_what_is_stored_times_the_factor_is_what_kernels_read(bits, group, make):
    stored = half(torch.randn(24, 30), bits, group=group, ranges=group)
    table = read_table(stored)
    storage, layout = make(table, "weight"), stored.spec.scale_layout
    held = storage.levels()
    assert (held >= 0).all()
    assert (held < 2 ** storage.widths[:, None]).all()
    factor = np.ones((1, 1), np.int32) if storage.factor is None else storage.factor
    assert np.array_equal(held * layout.expand(torch.from_numpy(factor)).numpy(), table.levels)
    assert table.levels.max() < 2**table.kernel_bits
    assert table.zero_point.max() < 2**storage.zero_point_bits
    weight = (table.levels - layout.expand(torch.from_numpy(table.zero_point)).numpy()) * layout.expand(
        torch.from_numpy(table.scale)
    ).numpy()
    assert np.array_equal(weight.astype(np.float32), stored().numpy())


def test_dynamic_products_are_integers_about_an_integer_and_exact_everywhere(path):
    layers = [Linear(384, 512, bits, name=f"w{bits}") for bits in (1, 2, 3, 4)]
    layers.append(Linear(384, 512, torch.tensor([1, 2, 3, 6])[torch.arange(512) % 4][:, None], name="mixed"))
    for layer in layers:
        bits = layer.weight.bits.int()
        layer.weight = half(torch.randn(512, 384), bits, name=layer.weight.spec.name)
    model = Parallel(*layers).eval()
    result = export_onnx(model, torch.randn(8, 384), path, activations="dynamic")
    assert {record.rule for record in result.weights} == {"dynamic"}
    assert {record.products for record in result.weights} == {("int8",)}
    fresh = torch.randn(5, 384)
    for machine in MACHINES:
        for found, expected in zip(run_on(machine, path, fresh), model(fresh), strict=True):
            assert (found - expected).abs().max() < 0.015 * expected.abs().max()
    proven = find_products(path)
    assert len(proven) == len(layers)
    for product, layer in zip(proven, layers, strict=True):
        table = read_table(layer.weight)
        assert np.array_equal(product.levels.T.astype(np.int32), table.levels - table.zero_point), "the proof sees doubled levels"
        assert is_exact(product.levels)
        assert product.inputs <= MAX_INPUTS


@pytest.mark.parametrize("form", ["any", "equal", "moved"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_form_of_a_product_fits_its_type(bits, form):
    table = read_table(half(torch.randn(40, 50), bits))
    chosen = choose_form(table, form)
    levels = table.levels - (table.zero_point if chosen.centred else 0) - chosen.offset
    assert np.array_equal(levels.astype(chosen.dtype.numpy()), levels)
    assert is_exact(levels.astype(chosen.dtype.numpy()))


@pytest.mark.parametrize("groups", [1, 32])
def test_integer_convolutions(groups, path):
    shape = (32, 32 // groups, 3, 3)
    images = torch.randn(2, 32, 6, 6)
    layers = [Conv(lambda x, w: F.conv2d(x, w, groups=groups), shape, bits, name=f"w{bits}") for bits in (1, 2, 3, 4)]
    for layer in layers:
        layer.weight = half(torch.randn(shape), int(layer.weight.bits.max()), name=layer.weight.spec.name)
    model = Parallel(*layers).eval()
    result = export_onnx(model, images, path, activations="int8", calibration=[images])
    assert {record.rule for record in result.weights} == {"int8"}
    for product, layer in zip(find_products(path), layers, strict=True):
        table = read_table(layer.weight)
        learned = (table.levels - table.zero_point).reshape(shape)
        found = product.levels.astype(np.int32)
        moved = (found - learned).reshape(32, -1)
        assert (moved == moved[:, :1]).all(), "the same levels about one zero point for each channel"
    for found, expected in zip(run_exact(path, images), model(images), strict=True):
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_channel_that_batch_norm_has_switched_off(path):
    """Its scale is 0, and no level lies at its zero point."""
    model = nn.Sequential(Conv(F.conv2d, (32, 32, 3, 3), 2), nn.BatchNorm2d(32))
    model[0].weight = half(torch.randn(32, 32, 3, 3), 2)
    model[1].weight.data[::2] = 0
    images = torch.randn(2, 32, 6, 6)
    export_onnx(model.eval(), images, path, activations="int8", calibration=[images])
    found = run_exact(path, images)
    assert not found[:, ::2].any()
    assert_same(found[:, 1::2], model(images)[:, 1::2], 0.03)


def test_embeddings_pick_rows(path, tmp_path):
    words = torch.tensor([1, 2, 3, 5])[torch.arange(4096) % 4][:, None]
    model = Parallel(Embedding(words, "channel", "mixed"), Embedding(2, "channel", "two"), Embedding(2, 16, "blocks")).eval()
    ids = torch.arange(0, 4095, 7).reshape(5, -1)
    result = export_onnx(model, ids, path)
    assert {record.rule for record in result.weights} == {"rows"}
    exactly(run_exact(path, ids), model(ids))
    exactly(ReferenceEvaluator(str(path)).run(None, {"inputs_0": ids.numpy()}), model(ids))


class Embedding(nn.Module):
    def __init__(self, bits, group, name):
        super().__init__()
        self.table = half(torch.randn(4096, 64), bits, group=group, ranges=group, name=name)

    def forward(self, ids):
        return F.embedding(ids, self.table())


@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
def test_recurrent_tied_and_turned_readers(layout, path):
    rnn = Swapped(nn.GRU(16, 16, batch_first=True), 2)
    rnn.stored = nn.ModuleList(half(rnn.module.get_parameter(name), 2, name=name) for name in rnn.names)
    export_onnx(rnn.eval(), torch.randn(2, 5, 16), path, layout=layout)
    assert_same(run_exact(path, fresh := torch.randn(2, 5, 16)), rnn(fresh))
    tied = Tied(50, 16, 2)
    tied.table = half(torch.randn(50, 16), 2)
    export_onnx(tied.eval(), ids := torch.arange(50)[None], path, layout=layout)
    assert_same(run_exact(path, ids), tied(ids))
    bare = Bare(24, 10, 2)
    bare.weight = half(torch.randn(24, 10), 2, axis=1)
    export_onnx(bare.eval(), torch.randn(1, 24), path, layout=layout)
    assert_same(run_exact(path, fresh := torch.randn(3, 24)), bare(fresh))


@pytest.mark.parametrize("bits", [2, MIXED])
def test_the_inspection_knows_levels_behind_their_factor(bits, path):
    model = Gives(bits, "channel")
    export_onnx(model.eval(), torch.zeros(2), path)
    inspection = inspect_onnx(path)
    assert inspection.metadata.weights[0].grid == "half"
    levels = [tensor for tensor in inspection.tensors if ".levels" in tensor.name]
    assert {tensor.role for tensor in levels} == {"quantized"}
    assert sum(sum(tensor.learned_bits.values()) for tensor in levels) == 24 * 30
    roles = {tensor.name.split(".")[1]: tensor.role for tensor in inspection.tensors if tensor.name.startswith("weight.")}
    assert (roles["scale"], roles["zero_point"], roles.get("factor", "scale")) == ("scale", "zero_point", "scale")


def test_what_no_container_holds_is_refused(path):
    model = Linear(24, 12, 16, grid="half").eval()
    model.weight.zero_point += 0.5
    with pytest.raises(ExportError, match=r"weight 'weight' has a half-integer zero point at 16 bits.*grid=\"affine\""):
        export_onnx(model, torch.randn(1, 24), path)
    model.weight.zero_point += 0.2
    with pytest.raises(ExportError, match="has zero points that are no multiples of 1/2"):
        export_onnx(model, torch.randn(1, 24), path)


@pytest.mark.parametrize(
    ("bits", "reason"), [(8, "the widest channel has 8 and is doubled for half-integer zero points"), (12, "has 12 and")]
)
def test_what_is_too_wide_for_a_kernel_is_folded_and_says_why(bits, reason, path):
    model = Linear(384, 512, bits, grid="half").eval()
    model.weight.zero_point += 0.5
    result = export_onnx(model, torch.randn(1, 384), path)
    assert reason in result.weights[0].reason
    assert_same(run_exact(path, fresh := torch.randn(3, 384)), model(fresh))
