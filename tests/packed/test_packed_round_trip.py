"""Every width, layout, grid and type comes back bit by bit: as tensors, into a float model, into a converted model."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import assert_equal, bits_of, converted, expected, float_twin, round_trip, store, stored_in

from benchmarks._damage import Forgery
from diffq_fx import PackedFileError, convert, prepare
from diffq_fx.budget.entropy import SMALL_BYTES
from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed.integer_kind import PackedIntegers
from diffq_fx.export.packed.packed_report import inspect_packed
from diffq_fx.file_kinds import foreign_kind
from diffq_fx.functional import QuantParams
from diffq_fx.kernels import extension
from diffq_fx.methods import STE
from diffq_fx.storage import IntegerWeight

GROUPS = ("tensor", "channel", 1, 3, 4, 8)
SHAPES = (((6, 10), 0), ((5, 11, 3), 1), ((1, 7), 0), ((9, 1), 0), ((3, 200), 0), ((4, 6, 3, 3), 2))
GRIDS = ("affine", "half", "symmetric", "float")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.sampled_from(SHAPES),
    bits=st.one_of(st.integers(1, 16), st.tuples(st.integers(1, 8), st.integers(8, 16))),
    group=st.sampled_from(GROUPS),
    ranges=st.sampled_from(("tensor", "channel", "group")),
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from(DTYPES),
    compression=st.sampled_from(("entropy", "bits")),
    seed=st.integers(0, 999),
)
def test_weights_of_all_kinds(tmp_path_factory, shape, bits, group, ranges, grid, dtype, compression, seed):
    ranges = group if ranges == "group" else ranges
    weight = store("layer.weight", shape[0], axis=shape[1], bits=bits, group=group, ranges=ranges, grid=grid, dtype=dtype, seed=seed)
    round_trip(converted(weight), tmp_path_factory.mktemp("packed") / "model.safetensors", compression)


@pytest.mark.parametrize("compression", ["entropy", "bits"])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_large_enough_for_the_coder(tmp_path, bits, compression):
    weights = [store(f"on_{grid}.weight", (40, 530), bits=bits, grid=grid, seed=bits) for grid in GRIDS]
    round_trip(converted(*weights), tmp_path / "m.safetensors", compression)


@pytest.mark.parametrize("compression", ["entropy", "bits"])
@pytest.mark.parametrize("group", ["tensor", "channel", 1, 8, 7])
def test_every_layout_in_many_parts_and_shards(tmp_path, group, compression, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.packed.shards._PART_WEIGHTS", 3000)
    monkeypatch.setattr("diffq_fx.export.packed.shards._LEAST_CODES", 1 << 14)
    weights = [
        store("a", (300, 129), bits=(1, 16), group=group, ranges="channel"),
        store("b", (7, 50, 3), axis=1, bits=(2, 5), group=group, ranges="tensor", grid="float", dtype=torch.float16),
        store("c", (64, 300), bits=(2, 8), group=group, grid="symmetric"),
    ]
    path = tmp_path / "m.safetensors"
    round_trip(converted(*weights), path, compression)
    assert inspect_packed(path).shards > 3
    for name in "abc":
        assert_equal(load_packed(path, names=[name]), {name: expected(converted(*weights))[name]})


def test_threads_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.packed.shards._LEAST_CODES", 1 << 14)
    model = converted(*(store(f"w{i}", (100, 300), seed=i) for i in range(5)))
    path = save_packed(model, tmp_path / "m.safetensors")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_equal(load_packed(path), expected(model))
        assert_equal(load_packed(float_twin(model), path).state_dict(), expected(model))
    finally:
        torch.set_num_threads(before)


def test_zero_points_and_scales_that_no_grid_gives(tmp_path):
    weight = store("w", (6, 20), bits=(2, 8), group=4, ranges="channel")
    weight.zero_point[0, 0] = -5
    weight.zero_point[2, 1] = 70000
    weight.scale[3, 2] *= 1.37
    round_trip(converted(weight), tmp_path / "m.safetensors", "entropy")


def zero_points_are(form, *, bits=(1, 4), group="channel"):
    """A weight on the grid "half" whose zero points the file stores in one of its forms."""
    weight = store("w", (40, 260), bits=bits, group=group, ranges="channel", grid="half")
    top = 2 ** weight.bits.float().expand(weight.scale.shape) - 1
    seen = {"centre": top / 2, "middle": (top + 1) / 2, "coded": (top / 2).floor(), "plain": top / 2 + 0.25}
    mixed = torch.where(torch.arange(top.numel()).reshape(top.shape) % 3 == 0, seen["coded"], seen["centre"])
    weight.zero_point = seen.get(form, mixed).contiguous()
    return weight


@pytest.mark.parametrize("group", ["channel", 8])
@pytest.mark.parametrize("form", ["centre", "halves", "coded", "middle", "plain"])
def test_zero_points_of_the_half_grid_take_the_smallest_form(tmp_path, form, group):
    weight = zero_points_are(form, group=group)
    assert PackedIntegers.of_stored(weight).facts()["zero_point"] == form
    round_trip(converted(weight), tmp_path / "m.safetensors", "entropy")


def test_half_zero_points_beyond_small_integers_are_plain(tmp_path):
    weight = zero_points_are("halves", bits=16)
    assert PackedIntegers.of_stored(weight).facts()["zero_point"] == "plain"
    round_trip(converted(weight), tmp_path / "m.safetensors", "bits")


def test_one_bit_takes_one_bit_and_centred_levels_no_zero_points(tmp_path):
    size = {}
    for form in ("centre", "halves"):
        weight = zero_points_are(form, bits=1)
        path = tmp_path / f"{form}.safetensors"
        round_trip(converted(weight), path, "bits")
        (report,) = inspect_packed(path).weights
        assert report.bits == {1: 40 * 260}
        assert report.coded_bytes <= 40 * 260 / 8 + 1
        size[form] = report.side_bytes
    assert size["halves"] - size["centre"] == 11, "40 zero points of 2 bits, and the head of their stream"


@pytest.mark.parametrize(("grid", "dtype"), [("half", torch.int32), ("affine", torch.float32)])
def test_zero_points_of_another_type_are_refused(tmp_path, grid, dtype):
    weight = store("w", (6, 20), grid=grid)
    weight.zero_point = weight.zero_point.to(dtype)
    with pytest.raises(PackedFileError, match=rf"weight 'w': zero_point is {dtype}, the grid '{grid}' has "):
        save_packed(converted(weight), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_constant_or_zero(tmp_path):
    weights = [store(f"w{i}", (30, 300), bits=(2, 5), group=g, ranges="channel", spread=0.0) for i, g in enumerate(("channel", 8))]
    path = tmp_path / "m.safetensors"
    round_trip(converted(*weights), path, "entropy")
    assert path.stat().st_size > 2 * 30 * 300 / 128  # never so few bytes that a reader could be made to allocate without limit


def test_a_scale_with_ranges_of_several_widths_is_stored_once_per_range(tmp_path):
    weight = store("w", (64, 1024), bits=(2, 8), group=8, ranges="channel")
    (report,) = inspect_packed(save_packed(converted(weight), tmp_path / "m.safetensors")).weights
    one_scale_each = 4 * 64 * 1024 / 8
    assert report.side_bytes < one_scale_each / 4
    round_trip(converted(weight), tmp_path / "m.safetensors", "bits")


@pytest.mark.parametrize("compression", ["entropy", "bits"])
def test_a_tied_weight_is_stored_once(tmp_path, compression):
    tied = store("embedding.weight", (200, 64), aliases=("head.weight",))
    model = converted(tied)
    path = tmp_path / "m.safetensors"
    round_trip(model, path, compression)
    single = save_packed(converted(store("embedding.weight", (200, 64))), tmp_path / "single.safetensors", compression)
    assert path.stat().st_size - single.stat().st_size < 100
    tensors = load_packed(path)
    assert tensors["embedding.weight"] is tensors["head.weight"]
    untied = load_packed(float_twin(model, tie=False), path)
    assert_equal(untied.state_dict(), expected(model))


@pytest.mark.parametrize("begin", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_a_header_whose_length_begins_as_a_pickle_does(tmp_path, begin):
    """640, 896, 1152 and 1408 bytes: the same first bytes as those of pickles of protocols 2 to 5."""
    path, size = tmp_path / "m.safetensors", int.from_bytes(begin, "little")
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(size)
    path.write_bytes(size.to_bytes(8, "little") + header + bytes(8))
    assert foreign_kind(path) == ""
    with pytest.raises(PackedFileError, match="without what save_packed"):
        load_packed(path)


@pytest.mark.parametrize("size", [640, 896])
def test_a_packed_file_whose_header_length_is_that_of_a_pickle(tmp_path, size):
    """A large tensor stands in the header by its name: one of some length makes the header as long as wanted."""
    path, large = tmp_path / "m.safetensors", torch.randn(SMALL_BYTES)
    length = 1
    while True:
        model = converted(store("w", (4, 8)), **{"b" * length: large})
        now = int.from_bytes(save_packed(model, path, "bits").read_bytes()[:8], "little")
        if now >= size:
            break
        length += size - now
    assert now == size
    assert_equal(load_packed(path), expected(model))


class _WritesItself(torch.nn.Linear):
    """Puts its weight in a state_dict by itself, wherever it comes from."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


def _tied_by_hand():
    model = torch.nn.Sequential(_WritesItself(16, 16), torch.nn.ReLU(), _WritesItself(16, 16))
    model[2].weight = model[0].weight
    return model


def _with_a_hook():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
    model[0].register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}weight": module.weight}))
    return model


@pytest.mark.parametrize("build", [lambda: torch.nn.Sequential(_WritesItself(16, 16), torch.nn.ReLU()), _tied_by_hand, _with_a_hook])
@pytest.mark.parametrize("scope", ["model", "module"])
def test_a_layer_that_writes_its_own_state_is_stored_once(tmp_path, build, scope):
    """As torch_geometric's Linear: its state_dict has the dequantized weight beside the stored one."""
    prepared = prepare(build(), torch.zeros(1, 16), STE(bits=4), scope=scope)
    model = convert(prepared)
    path = save_packed(model, tmp_path / "m.safetensors")
    rows = torch.randn(3, 16)
    assert torch.equal(load_packed(build(), path)(rows), model(rows))
    other = convert(prepare(build(), torch.zeros(1, 16), STE(bits=4), scope=scope))
    assert torch.equal(load_packed(other, path)(rows), model(rows))


def test_every_type_of_buffer(tmp_path):
    buffers = {
        "half_": torch.randn(5, dtype=torch.float16),
        "brain_": torch.randn(5).bfloat16(),
        "double_": torch.randn(2, 3, dtype=torch.float64),
        "float_": torch.randn(7),
        "odd_": torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 65504.0]),
        "exact_half_": torch.arange(9.0) / 4,
        "count_": torch.tensor(12),
        "mask_": torch.tensor([[True, False]]),
        "byte_": torch.arange(3, dtype=torch.uint8),
        "small_": torch.tensor([-3], dtype=torch.int8),
        "empty_": torch.zeros(0, 4),
        "empty_too_": torch.zeros(3, 0),
        "empty_integers_": torch.zeros(0, dtype=torch.int64),
        "scalar_": torch.tensor(3.25),
        "strided_": torch.randn(4, 6).t(),
    }
    path = tmp_path / "m.safetensors"
    round_trip(converted(store("w", (4, 40), scale_dtype=torch.float16), **buffers), path, "entropy")
    stored = {t.name: (t.dtype, t.stored_dtype) for t in inspect_packed(path).tensors}
    assert stored["exact_half_"] == ("F32", "F16")  # no bit is lost
    assert stored["float_"] == ("F32", "F32")
    assert stored["odd_"] == ("F32", "F32")


def test_a_tensor_of_two_names_is_stored_once(tmp_path):
    shared = torch.randn(30)
    model = converted(store("w", (4, 40)), one=shared, two=shared)
    tensors = load_packed(path := save_packed(model, tmp_path / "m"))
    assert torch.equal(tensors["one"], shared)
    assert tensors["one"] is tensors["two"]
    assert [(tensor.name, tensor.aliases) for tensor in inspect_packed(path).tensors] == [("one", ("two",))]


def test_a_target_in_any_memory_order(tmp_path):
    model = converted(store("w", (8, 4, 3, 3)), store("t", (4, 8, 3, 3), axis=1))
    path = save_packed(model, tmp_path / "m.safetensors")
    twin = float_twin(model).to(memory_format=torch.channels_last)
    version = twin.w._version
    load_packed(twin, path)
    assert_equal(twin.state_dict(), expected(model))
    assert twin.w.is_contiguous(memory_format=torch.channels_last)
    assert twin.w._version > version


def test_a_load_is_seen_by_whoever_watches_versions(tmp_path):
    model = converted(store("w", (8, 40)))
    twin = float_twin(model)
    version = twin.w._version
    load_packed(twin, save_packed(model, tmp_path / "m.safetensors"))
    assert twin.w._version > version
    assert twin.w.requires_grad


@pytest.mark.parametrize(("distribution", "limit"), [("gaussian", 1.01), ("laplacian", 1.015)])
@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_the_file_is_at_the_entropy_of_its_levels(tmp_path, grid, distribution, limit):
    """Levels at their order-0 entropy for each width, widths at theirs, 32 bits a scale, b bits an affine zero point."""
    generator = np.random.default_rng(0)
    shape = (1000, 2500)
    weight = store("w", shape, bits=(2, 6), grid=grid)
    if distribution == "laplacian":
        weight = relaid(weight, torch.from_numpy(generator.laplace(size=shape)).float())
    path = save_packed(converted(weight), tmp_path / "m.safetensors")
    levels, widths = weight.levels_OI().numpy(), weight.bits.numpy()
    payload = sum(entropy(levels[(widths == w)[:, 0]]) for w in np.unique(widths))
    zero_points = float(widths.sum()) if grid == "affine" else 0
    order_0 = (payload + entropy(widths) + 32 * widths.size + zero_points) / 8
    assert path.stat().st_size <= limit * order_0


def relaid(weight, values):
    """Another weight with the widths of a first one."""
    from diffq_fx import functional

    spec, bits = weight.spec, weight.bits.int()
    params = functional.quant_params(*functional.grid_range(*spec.range_layout.aminmax(values), spec.grid), bits, spec.grid)
    return IntegerWeight(spec, functional.quantize(values, params, bits, spec.scale_layout), params, bits)


def entropy(values):
    counts = np.unique(values, return_counts=True)[1]
    return float(counts @ np.log2(counts.sum() / counts))


def test_inspection_adds_up(tmp_path):
    model = converted(store("a", (100, 600)), store("b", (50, 800), group=16), extra=torch.randn(100))
    path = save_packed(model, tmp_path / "m.safetensors")
    found = inspect_packed(path)
    assert [report.name for report in found.weights] == ["a", "b"]
    for report, stored in zip(found.weights, stored_in(model), strict=True):
        assert sum(w * n for w, n in report.bits.items()) == stored.footprint().payload_bits
        assert sum(report.bits.values()) == report.values == stored.spec.numel
        assert report.bit_packed_bytes == -(-stored.footprint().payload_bits // 8)
        assert 0.93 * report.entropy_bytes < report.coded_bytes < 1.05 * report.entropy_bytes
    parts = sum(r.coded_bytes + r.side_bytes for r in found.weights) + sum(t.stored_bytes for t in found.tensors)
    assert 0 < found.header_bytes == round(path.stat().st_size - parts) < 2000
    assert found.to_dict()["header_bytes"] == found.header_bytes


def test_inspection_gives_each_its_own_bytes(tmp_path):
    alike = {grid: store(grid, (64, 64), bits=4, grid=grid) for grid in ("affine", "symmetric")}
    four = store("four", (1, 4), bits=2)
    four = IntegerWeight(four.spec, torch.arange(4, dtype=torch.int32)[None], QuantParams(four.scale, four.zero_point, None), four.bits)
    table = torch.arange(100_000) % 30_000
    model = converted(four, *alike.values(), table=table, wide=torch.randn(200, 200), ten=torch.randn(10), thirty=torch.randn(30))
    path = save_packed(model, tmp_path / "m.safetensors")
    found = inspect_packed(path)
    weights, tensors = ({each.name: each for each in every} for every in (found.weights, found.tensors))
    assert (weights["four"].entropy_bytes, weights["four"].bit_packed_bytes) == (1.0, 1)
    assert weights["affine"].side_bytes > weights["symmetric"].side_bytes, "it has zero points"
    assert (tensors["wide"].stored_bytes, tensors["table"].stored_bytes) == (160_000, 200_000)
    assert tensors["thirty"].stored_bytes == pytest.approx(3 * tensors["ten"].stored_bytes)
    (small,) = Forgery(path.read_bytes()).header["diffq_fx/small"]["shape"]
    assert tensors["thirty"].stored_bytes + tensors["ten"].stored_bytes == pytest.approx(small)
    assert_equal(load_packed(path), expected(model))


def test_what_all_weights_of_a_kind_say_is_said_once(tmp_path):
    model = converted(*(store(name, (4, 40), bits=5, group=group) for name, group in (("a", 8), ("b", 8), ("c", "channel"))))
    contents = Forgery(save_packed(model, tmp_path / "m").read_bytes()).contents
    assert {"dtype": "float32", "grid": "affine", "consumer": "linear"}.items() <= contents["defaults"]["integer"].items()
    assert [sorted(each) for each in contents["weights"]] == [["group_size", "kind", "name", "range_size", "shape"]] * 3


ALL_KINDS = {
    "a": 835952089,
    "b.weight": 1593241898,
    "c.weight": 1593241898,
    "d": 2356185704,
    "t": 2337633397,
    "large": 729186632,
    "e": 3105524212,
    "bias": 2806869373,
    "mask": 1489118142,
    "table": 1911013890,
}
HALF = {"centre": 1696059129, "halves": 2617775900, "blocks": 344772744, "plain": 3834588716}


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(("name", "sums"), [("entropy", ALL_KINDS), ("bits", ALL_KINDS), ("half", HALF)])
def test_files_that_were_written_before_still_load(name, sums, kernels, monkeypatch):
    """All kinds of weights, and half-integer zero points, written on 2026-11-26. If this fails and shall fail, the format needs a new version."""
    monkeypatch.setenv("DIFFQ_FX_KERNELS", kernels)
    monkeypatch.setattr(extension, "kernels", extension.kernels.__wrapped__)
    found = load_packed(Path(__file__).parent / "stored" / f"{name}.safetensors")
    assert {name: zlib.crc32(bits_of(tensor).numpy().tobytes()) for name, tensor in found.items()} == sums
