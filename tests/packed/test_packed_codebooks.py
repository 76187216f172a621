"""Weights of codes: every K, block and type of entries comes back bit by bit; codes and codebooks that do not fit are refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import assert_equal, converted, expected, float_twin, round_trip, store, store_codes
from torch import nn
from typer.testing import CliRunner

from benchmarks._damage import Forgery
from diffq_fx import convert, prepare
from diffq_fx.cli import app
from diffq_fx.errors import PackedFileError
from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed.packed_report import inspect_packed
from diffq_fx.methods import LC, ProductQuantization
from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.storage.packing import pack_levels

ENTRY_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)
SHAPES = (((6, 10), 0), ((5, 11, 3), 1), ((1, 7), 0), ((9, 1), 0), ((3, 200), 0), ((4, 6, 3, 3), 2))


@settings(deadline=None, max_examples=150)
@given(
    shape=st.sampled_from(SHAPES),
    entries=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 200, 256, 257, 3000]),
    block=st.sampled_from([1, 2, 3, 8, 9, 300]),
    entry_dtype=st.sampled_from(ENTRY_TYPES),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    compression=st.sampled_from(("entropy", "bits")),
    seed=st.integers(0, 999),
)
def test_codes_of_all_kinds(tmp_path_factory, shape, entries, block, entry_dtype, dtype, compression, seed):
    weight = store_codes(
        "layer.weight", shape[0], axis=shape[1], entries=entries, block=block, entry_dtype=entry_dtype, dtype=dtype, seed=seed
    )
    round_trip(converted(weight), tmp_path_factory.mktemp("packed") / "model.safetensors", compression)


@pytest.mark.parametrize("compression", ["entropy", "bits"])
@pytest.mark.parametrize("entries", [2, 3, 8, 16, 256, 1000, 65536])
def test_codes_large_enough_for_the_coder_beside_integers_in_many_parts_and_shards(tmp_path, entries, compression, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.packed.shards._PART_WEIGHTS", 3000)
    monkeypatch.setattr("diffq_fx.export.packed.shards._LEAST_CODES", 1 << 14)
    model = converted(
        store_codes("a", (90, 530), entries=entries, aliases=("tied.weight",)),
        store_codes("b", (64, 30, 3), axis=1, entries=entries, block=3, entry_dtype=torch.int8),
        store("c", (64, 300)),
        store_codes("d", (100, 333), entries=entries, block=8, entry_dtype=torch.float16, seed=1),
        odd=torch.tensor([True, False, True]),
    )
    path = tmp_path / "m.safetensors"
    round_trip(model, path, compression)
    assert inspect_packed(path).shards > 3
    assert_equal(load_packed(path, names=["d"]), {"d": expected(model)["d"]})


def test_a_codebook_is_stored_once_and_codes_at_their_entropy(tmp_path):
    weight = store_codes("w", (2000, 1000), entries=256, block=8)
    (report,) = inspect_packed(save_packed(converted(weight), tmp_path / "m.safetensors")).weights
    assert (report.kind, report.description, report.bits) == ("codebook", "codebook 256x8 F32", {8: 250_000})
    assert 256 * 8 * 4 < report.side_bytes < 256 * 8 * 4 + 1000
    assert report.coded_bytes < 1.01 * report.entropy_bytes
    assert report.entropy_bytes < report.bit_packed_bytes == 250_000


def test_inspect_names_the_codebook(tmp_path):
    path = save_packed(converted(store_codes("w", (40, 60), entries=100, block=8, entry_dtype=torch.int8)), tmp_path / "m.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, result.stderr
    assert "codebook 100x8 I8" in result.stdout
    (weight,) = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout)["weights"]
    assert (weight["kind"], weight["values"], weight["bits"]) == ("codebook", 2400, {"7": 320})


X = torch.randn(2, 3, 8, 8)


def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 40))


@pytest.mark.parametrize(
    "method",
    [
        LC(codebook="adaptive", entries=5),
        LC(codebook="scaled_ternary"),
        ProductQuantization(entries=32, block_size=4),
        ProductQuantization(entries=20, entry_dtype="int8"),
        ProductQuantization(entries=8, entry_dtype="float16"),
    ],
    ids=["lc-5", "lc-ternary", "pq", "pq-int8", "pq-float16"],
)
def test_the_whole_road_of_each_method(tmp_path, method):
    model = convert(prepare(net(), X, method)).eval()
    assert sum(isinstance(module, CodebookWeight) for module in model.modules()) == 2
    path = save_packed(model, tmp_path / "m.safetensors")
    assert torch.equal(load_packed(net(), path).eval()(X), model(X))
    skeleton = convert(prepare(net(), X, method)).eval()
    assert_equal(load_packed(skeleton, path).state_dict(), model.state_dict())
    assert torch.equal(skeleton(X), model(X))


# What is refused


def write_forged(tmp_path, change, **options):
    model = converted(store_codes("w", (40, 64), **options), bias=torch.randn(3))
    path = save_packed(model, tmp_path / "m.safetensors", "bits")
    forgery = Forgery(path.read_bytes())
    change(forgery)
    path.write_bytes(forgery.build())
    return path, model


def weight(forgery):
    return forgery.contents["weights"][0]


def set_first_code(forgery):
    """Make the first bytes of the codes of shard 0 as large as they can be."""
    start = forgery.header["diffq_fx/shard/0"]["data_offsets"][0]
    section = sum(forgery.contents["shards"][0]["sections"][:4])
    forgery.body[start + section + 1] = 0xFF
    forgery.fix_checksums()


def set_width(forgery):
    """Another width in the first section, which is one stored value of 4 bits."""
    start = forgery.header["diffq_fx/shard/0"]["data_offsets"][0]
    forgery.body[start + 1] = 1
    forgery.contents["shards"][0]["classes"][0][0] = 2
    forgery.fix_checksums()


FORGERIES = {
    "a code out of range": (set_first_code, {"entries": 15}, "a code of 'w' is 15, it has 15 entries"),
    "another width": (set_width, {}, "codes of 2 bits do not index 16 entries"),
    "no entries": (lambda f: weight(f).update(entries=0), {}, "weight 'w': its codebook has 0 entries"),
    "too many entries": (lambda f: weight(f).update(entries=2**17), {}, "weight 'w': its codebook has 131072 entries"),
    "other entries": (lambda f: weight(f).update(entries=8), {}, r"weight 'w': expected a common tensor of .*\(8, 1\).*, got .*\(16, 1\)"),
    "another block": (lambda f: weight(f).update(block_size=2), {}, "expected a common tensor"),
    "a huge block": (lambda f: weight(f).update(block_size=2**50), {}, "its block size 1125899906842624 is not possible"),
    "another type": (lambda f: weight(f).update(entry_dtype="F16"), {}, "expected a common tensor"),
    "an impossible type": (lambda f: weight(f).update(entry_dtype="BOOL"), {}, "weight 'w': expected one of the types F32, .* got 'BOOL'"),
    "a scale that is no float32": (lambda f: weight(f).update(scale=0.1), {}, "its scale 0.1 is not a float32"),
    "a scale that is no number": (lambda f: weight(f).update(scale="1"), {}, "its scale 1 is not a float32"),
    "another checksum": (lambda f: weight(f).update(common_crc32=5), {}, "the checksum of the codebook of 'w' does not fit"),
    "no checksum": (lambda f: weight(f).pop("common_crc32"), {}, "a checksum is missing"),
    "a larger weight": (lambda f: weight(f).update(shape=[40, 10**7]), {}, "too small for its rows"),
    "a weight of huge blocks": (
        lambda f: weight(f).update(shape=[40, 10**6], block_size=10**6, entries=1),
        {"entries": 1, "block": 64},
        "common tensor|too small for its rows",
    ),
    "integers": (
        lambda f: (
            weight(f).update(kind="integer", scale="groups", zero_point="none", scale_dtype="float32"),
            f.contents.update(defaults={"integer": f.contents["defaults"]["codebook"]}),
        ),
        {},
        "common tensors",
    ),
}


@pytest.mark.parametrize(("change", "options", "match"), FORGERIES.values(), ids=FORGERIES)
def test_forgeries(tmp_path, change, options, match):
    path, model = write_forged(tmp_path, change, **options)
    twin = float_twin(model)
    for load in (lambda: load_packed(path), lambda: load_packed(twin, path), lambda: inspect_packed(path)):
        with pytest.raises(PackedFileError, match=match):
            load()
    assert (twin.w == 7).all()


def test_a_damaged_codebook_is_refused(tmp_path):
    path = save_packed(converted(store_codes("w", (40, 64))), tmp_path / "m.safetensors")
    data, forgery = bytearray(path.read_bytes()), Forgery(path.read_bytes())
    start = forgery.body_start + forgery.header["diffq_fx/common/0"]["data_offsets"][0]
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackedFileError, match="is damaged: the checksum of the codebook of 'w' does not fit"):
        load_packed(path)


def test_what_cannot_be_saved(tmp_path):
    def with_high_code(stored):
        stored.codes = pack_levels(torch.full((stored.num_codes,), 15, dtype=torch.int32), 4)

    cases = (
        (with_high_code, "weight 'w': a code is 15, its codebook has 11 entries"),
        (lambda stored: setattr(stored, "codebook", torch.zeros(11)), r"its codebook has the shape \(11,\)"),
        (lambda stored: setattr(stored, "codebook", torch.zeros(11, 1, dtype=torch.int16)), "the type torch.int16 cannot be stored"),
        (lambda stored: setattr(stored, "scale", torch.tensor(float("inf"))), "must be one finite float32"),
    )
    for change, match in cases:
        stored = store_codes("w", (40, 64), entries=11)
        change(stored)
        with pytest.raises(PackedFileError, match=match):
            save_packed(converted(stored), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
