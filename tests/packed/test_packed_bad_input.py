"""Whatever the bytes: one error of our type, or the right weights, in little time and memory; and the model as it was."""

import pickle
import random
import struct
import time
import tracemalloc
import zlib

import pytest
import safetensors
import safetensors.torch
import torch
from packed_models import assert_equal, converted, expected, float_twin, store, store_codes
from torch import nn

from benchmarks._damage import Forgery, damage, forge_body, forge_header
from diffq_fx.errors import DiffQError, PackedFileError
from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed.packed_report import inspect_packed

MUTATIONS = 400  # of each kind; benchmarks/packed_stress.py makes ten thousand
SLOWEST_LOAD = 60.0  # seconds: a load without end is meant, not a busy machine


def small_model(seed=0, **tensors):
    """All kinds of sections in a few thousand bytes."""
    return converted(
        store("a", (12, 20), bits=(1, 16), seed=seed),
        store("b.weight", (6, 5), axis=1, bits=(2, 6), group=4, ranges="channel", grid="float", aliases=("c.weight",), seed=seed),
        store("d", (9, 40), bits=(2, 4), group=8, ranges="channel", seed=seed),
        store_codes("e", (6, 21), entries=5, block=2, seed=seed),
        bias=torch.randn(7),
        steps=torch.tensor(3),
        mask=torch.tensor([True, False]),
        **tensors,
    )


def coded_model(seed=0):
    """Large enough for the entropy coder."""
    return converted(store("a", (64, 256), bits=(2, 5), seed=seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Contents of files, and what loading them gives."""
    folder = tmp_path_factory.mktemp("sound")
    made = {}
    with_large = small_model(large=torch.randn(130, 128))
    for name, model, compression in (("small", small_model(), "bits"), ("large", with_large, "bits"), ("coded", coded_model(), "entropy")):
        made[name] = (save_packed(model, folder / name, compression).read_bytes(), model)
    return made


def refuse(
    path, data, match="is damaged|is empty|is not a packed file|cut short|checksum|is a pickle|format version|without what save_packed"
):
    """Loading these bytes is an error of our type, and quick."""
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(PackedFileError, match=match):
        load_packed(path)
    assert time.monotonic() - start < SLOWEST_LOAD


def places_in(data, draw):
    """Bytes of a file: the first and last ones and some of all others."""
    edge = 32
    return [*range(edge), *sorted(draw.sample(range(edge, len(data) - edge), MUTATIONS)), *range(len(data) - edge, len(data))]


def test_cut_short_anywhere(tmp_path, files):
    data = files["small"][0]
    for stop in places_in(data, random.Random(0)):
        refuse(tmp_path / "m", data[:stop])


def test_any_byte_flipped(tmp_path, files):
    data, draw = files["small"][0], random.Random(0)
    for place in places_in(data, draw):
        damaged = bytearray(data)
        damaged[place] ^= draw.randrange(1, 256)
        refuse(tmp_path / "m", damaged)


def test_random_edits(tmp_path, files):
    """Bytes removed, added, replaced, swapped: never a load, since every byte is covered by a checksum."""
    draw = random.Random(1)
    for turn in range(MUTATIONS):
        refuse(tmp_path / "m", damage(files["small" if turn % 4 else "coded"][0], draw))


def test_forged_headers_with_checksums_that_fit(tmp_path, files):
    """Anything in the header replaced by anything: an error of our type, or tensors of the shapes that the header says."""
    draw, path, refused = random.Random(2), tmp_path / "m", 0
    for turn in range(MUTATIONS):
        path.write_bytes(forge_header(files["small" if turn % 4 else "coded"][0], draw))
        start = time.monotonic()
        try:
            load_packed(path)
        except PackedFileError:
            refused += 1
        assert time.monotonic() - start < SLOWEST_LOAD, turn
    assert refused > 0.8 * MUTATIONS


def test_forged_payloads_with_checksums_that_fit(tmp_path, files):
    """Other bytes under checksums that fit: an error of our type, or other weights of the same shapes; a model is whole or as it was."""
    draw, path, refused = random.Random(3), tmp_path / "m", 0
    for turn in range(MUTATIONS // 4):
        data, model = files["small" if turn % 2 else "coded"]
        path.write_bytes(forge_body(data, draw))
        twin = float_twin(model)
        before = {name: value.clone() for name, value in twin.state_dict().items()}
        try:
            load_packed(twin, path)
        except PackedFileError:
            refused += 1
            assert_equal(twin.state_dict(), before)
    assert refused > MUTATIONS // 20


def forged(files, change):
    forgery = Forgery(files["large"][0])
    change(forgery)
    return forgery.build()


def weight(forgery):
    return forgery.contents["weights"][0]


def shard(forgery):
    return forgery.contents["shards"][0]


FORGERIES = {
    "a newer version": (
        lambda f: f.header["__metadata__"].update(version="2"),
        "has the format version '2', or is damaged; this diffq_fx reads version 1",
    ),
    "a huge weight": (
        lambda f: weight(f).update(shape=[10**6, 10**6]),
        "does not hold its sections or is too small for its rows|expected .* rows",
    ),
    "a huge row": (lambda f: weight(f).update(shape=[12, 10**9]), "shard 0 of .* too small for its rows"),
    "a huge side": (lambda f: weight(f).update(shape=[2**41]), "weight 'a': its shape .* is not possible"),
    "no shape": (lambda f: weight(f).update(shape=[]), "weight 'a': its shape"),
    "a zero side": (lambda f: weight(f).update(shape=[0, 3]), "weight 'a': its shape"),
    "an axis too many": (lambda f: weight(f).update(axis=2), "weight 'a': its axis 2"),
    "another kind": (
        lambda f: weight(f).update(kind="wavelet"),
        "weight 'a': its kind 'wavelet' is not known here; integer and codebook are",
    ),
    "another type": (lambda f: weight(f).update(dtype="int8"), "weight 'a': expected one of the types float32, .* got 'int8'"),
    "half zero points of another grid": (lambda f: weight(f).update(zero_point="halves"), "zero_point 'halves' are not known"),
    "extents of ranges of one group each": (lambda f: weight(f).update(scale="extents"), "weight 'a': its scales cannot be extents"),
    "a name twice": (lambda f: weight(f).update(name="bias"), "two tensors have one name"),
    "rows twice": (lambda f: shard(f)["spans"].append(shard(f)["spans"][0]), "too small|rows are not in order"),
    "rows missing": (lambda f: shard(f)["spans"].pop(), "expected 6 rows, got 0"),
    "a class too wide": (lambda f: shard(f)["classes"].append([17, 0, 31]), "shard 0 is not described|classes that are not possible"),
    "a class twice": (lambda f: shard(f)["classes"].append(shard(f)["classes"][0]), "two models of . bits claim one bin"),
    "a class missing": (lambda f: shard(f)["classes"].pop(), "a group of weights has no model"),
    "a negative section": (lambda f: shard(f)["sections"].__setitem__(0, -5), "shard 0 is not described"),
    "a wrong checksum": (lambda f: shard(f).update(crc32=5), r"checksum of shard 0 \(with 'a'\) does not fit"),
    "a checksum of more than 32 bits": (lambda f: shard(f).update(crc32=2**32), "a checksum is missing in the header"),
    "another checksum": (lambda f: f.contents.update(tensors_crc32=5), "checksum of its plain tensors does not fit"),
    "another checksum of small tensors": (
        lambda f: f.contents["small_section"].__setitem__(1, 5),
        "checksum of its small tensors does not fit",
    ),
    "small tensors of another size": (
        lambda f: f.contents["small"]["bias"].update(shape=[9000]),
        "describes 36010 bytes of small tensors, which the file does not hold",
    ),
    "a tensor that is text": (lambda f: f.contents["tensors"].update(large="x"), "tensor 'large' is described by 'x'"),
    "a small tensor that is large": (
        lambda f: f.contents["small"]["bias"].update(shape=[40000]),
        "tensor 'bias' of 160000 bytes does not lie",
    ),
    "a small tensor that is missing": (lambda f: f.contents["small"].pop("steps"), "small tensors cannot be decoded"),
    "no section of small tensors": (lambda f: f.contents.pop("small_section"), "section of the small tensors is not described"),
    "no small tensors": (lambda f: f.contents.pop("small"), "does not say what its small tensors are"),
    "no small tensors where there is a section": (
        lambda f: f.contents.update(small={}),
        "the header describes 0 bytes of small tensors, which the file does not hold",
    ),
    "an unknown tensor": (lambda f: f.contents["tensors"].update(x={}), "describes tensor 'x', which is not there"),
    "a shard too few": (lambda f: f.contents.update(shards=[]), "describes 0 shards and 1 common tensors, the file has others"),
    "a gap": (lambda f: f.header["large"].update(data_offsets=[1, 1 + 130 * 128 * 4]), "begins at byte"),
    "a tensor too long": (lambda f: f.header["large"].update(shape=[70]), r"tensor 'large' of F32 \[70\] has 66560 bytes, not 280"),
    "many dimensions": (lambda f: f.header["large"].update(shape=[1] * 65), "tensor 'large' has shape"),
    "no contents": (lambda f: f.contents.clear(), "the header has no list of weights"),
    "no defaults": (lambda f: f.contents.pop("defaults"), "the header has no defaults of its weights"),
    "defaults that are a list": (lambda f: f.contents.update(defaults=[]), "the header has no defaults of its weights"),
    "defaults of a kind that are text": (lambda f: f.contents["defaults"].update(integer="x"), "the header has no defaults"),
    "a name by default": (lambda f: f.contents["defaults"]["integer"].update(name="a"), "or some that a weight must say itself"),
    "an impossible default": (
        lambda f: f.contents["defaults"]["integer"].update(dtype="U8"),
        "weight 'a': expected one of the types float32",
    ),
    "a type that half values cannot be stored for": (
        lambda f: f.contents["small"]["mask"].update(dtype="F32"),
        "tensor 'mask' of torch.float32 cannot be stored as torch.bool",
    ),
    "a bool of 2": (lambda f: f.contents["small"]["bias"].update(stored="BOOL", dtype="BOOL", shape=[28]), "a bool is stored as"),
    "a small tensor under its name": (
        lambda f: (f.header["large"].update(shape=[10], data_offsets=[0, 40]), f.body.__delitem__(slice(40, 130 * 128 * 4))),
        "begins at byte|tensor 'large' of 40 bytes does not lie where tensors of its size do",
    ),
}


@pytest.mark.parametrize(("change", "match"), FORGERIES.values(), ids=FORGERIES)
def test_forgeries_are_named_before_anything_is_allocated(tmp_path, files, change, match):
    data = forged(files, change)
    tracemalloc.start()
    try:
        refuse(tmp_path / "m", data, match)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_a_byte_behind_the_last_tensor(tmp_path, files):
    refuse(tmp_path / "m", files["large"][0] + b"\0", "its tensors end at byte")


def test_nothing_is_hidden_behind_small_tensors(tmp_path):
    zeros = {f"t{i}": torch.zeros(1000) for i in range(8)}
    forgery = Forgery(save_packed(converted(store("a", (4, 4)), **zeros), tmp_path / "m").read_bytes())
    start, stop = forgery.header["diffq_fx/small"]["data_offsets"]
    forgery.body[stop - 1] = 1
    forgery.contents["small_section"][1] = zlib.crc32(forgery.body[start:stop])
    refuse(tmp_path / "m", forgery.build(), "small tensors cannot be decoded: something is hidden in the zeros")


def test_a_header_that_is_longer_than_the_file_or_nested_without_end(tmp_path):
    refuse(tmp_path / "m", struct.pack("<Q", 2**62) + b"{}", "do not begin with the length of a header")
    text = b'{"a":' + b"[" * 10**6
    refuse(tmp_path / "m", struct.pack("<Q", len(text)) + text, "its header is not JSON")
    text = b'{"a":' + b"1" * 10**6 + b"}"
    refuse(tmp_path / "m", struct.pack("<Q", len(text)) + text, "its header is not JSON")
    text = rb'{"a":["\ud83d\ude00", "\uD83D"]}'
    refuse(tmp_path / "m", struct.pack("<Q", len(text)) + text, "its header is not JSON .*surrogates not allowed")
    text = b'{"a":1,"a":2}'
    refuse(tmp_path / "m", struct.pack("<Q", len(text)) + text, "the name 'a' occurs twice")


class Bomb:
    def __reduce__(self):
        return (pytest.exit, ("a pickle was opened",))


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    refuse(path, path.read_bytes(), "is a pickle")
    torch.save({"w": torch.zeros(3)}, path)
    refuse(path, path.read_bytes(), "is a pickle")
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    refuse(path, path.read_bytes(), "is a pickle")
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    refuse(
        path,
        path.read_bytes(),
        "read it with safetensors.torch.load_file; if diffq_fx wrote the Hugging Face folder .* by from_pretrained, and bits_report",
    )
    refuse(path, b"", "is empty: it has 0 bytes; a packed file is wanted")
    refuse(path, b"\0" * 7, "is not a packed file, or is damaged: its 7 bytes")
    with pytest.raises(PackedFileError, match=r"load_packed: '.*nothing': cannot be opened: No such file or directory\."):
        load_packed(tmp_path / "nothing")
    with pytest.raises(PackedFileError, match="is a folder: give a file in it"):
        load_packed(tmp_path)


def test_contents_that_inflate_without_end(tmp_path, files):
    forgery = Forgery(files["small"][0])
    coder = zlib.compressobj(9, wbits=-15)
    bomb = coder.compress(b"[" * 2**26) + coder.flush()
    tracemalloc.start()
    try:
        refuse(tmp_path / "m", forgery.build(bomb), "do not end, or have more than 1048576 bytes when inflated")
        refuse(tmp_path / "m", forgery.build(bomb[:100]), "do not end")
        refuse(tmp_path / "m", forgery.build(b"\xff" * 100), "cannot be inflated")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_contents_longer_than_the_file_are_not_deflated(tmp_path, monkeypatch):
    """What a writer writes, a reader has room for."""
    monkeypatch.setattr("diffq_fx.export.packed.container._ROOM_FOR_CONTENTS", 1 << 10)
    model = converted(store("a", (4, 4)), **{f"t{i}": torch.zeros(1) for i in range(300)})
    path = save_packed(model, tmp_path / "m")
    assert_equal(load_packed(path), expected(model))


def test_safetensors_reads_large_tensors_that_are_not_quantized(tmp_path):
    model = small_model(large=torch.randn(130, 128))
    path = save_packed(model, tmp_path / "m.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "diffq_fx.packed", "version": "1"}
        assert torch.equal(file.get_tensor("large"), model.large)


def model_for(change):
    twin = float_twin(small_model())
    change(twin)
    return twin


ARCHITECTURES = {
    "a name more": (lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(2))), "the file has no 'extra', which the Module has"),
    "a name less": (lambda m: delattr(m, "a"), "the Module has no 'a', which the file has"),
    "another shape": (
        lambda m: setattr(m, "a", nn.Parameter(torch.zeros(20, 12))),
        r"tensor 'a': the model has \(20, 12\) torch.float32, the file \(12, 20\)",
    ),
    "another type": (lambda m: m.half(), r"the model has .* torch\.float16, the file .* torch\.float32"),
    "another buffer": (lambda m: setattr(m, "bias", torch.zeros(8)), r"tensor 'bias': the model has \(8,\)"),
    "tied": (lambda m: setattr(m.b, "weight", m.d), "shape|the model ties"),
    "lazy": (lambda m: setattr(m, "a", nn.UninitializedParameter()), "'a' is not initialized yet: run the model once"),
}


@pytest.mark.parametrize(("change", "match"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_another_architecture_is_named_and_left_alone(tmp_path, files, change, match):
    path = tmp_path / "m"
    path.write_bytes(files["small"][0])
    model = model_for(change)
    before = {name: value.clone() for name, value in model.state_dict(keep_vars=True).items() if not nn.parameter.is_lazy(value)}
    with pytest.raises(PackedFileError, match=match):
        load_packed(model, path)
    assert_equal({name: value for name, value in model.state_dict(keep_vars=True).items() if name in before}, before)


def test_tensors_that_only_the_model_ties(tmp_path):
    path = save_packed(converted(store("a", (8, 8)), store("b", (8, 8), seed=1)), tmp_path / "m")
    model = float_twin(converted(store("a", (8, 8)), store("b", (8, 8), seed=1)))
    model.b = model.a
    with pytest.raises(PackedFileError, match="the model ties a and b, which the file holds as different tensors"):
        load_packed(model, path)
    assert (model.a == 7).all()


def test_a_converted_model_with_other_weights_is_left_alone(tmp_path):
    path = save_packed(converted(store("a", (8, 8)), store("b", (8, 8))), tmp_path / "m")
    for other, match in (
        (converted(store("a", (8, 8))), "weight 'b' is quantized in the file, but not in the converted model"),
        (converted(*(store(name, (8, 8)) for name in "abc")), "weight 'c' is quantized in the converted model, but not in the file"),
        (converted(store("a", (8, 8)), store("b", (4, 16))), r"weight 'b': the model has .*\(4, 16\).*, the file .*\(8, 8\)"),
        (converted(store("a", (8, 8)), store("b", (8, 8)), x=torch.zeros(1)), "the file has no 'x', which the Module has"),
    ):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(PackedFileError, match=match):
            load_packed(other, path)
        assert_equal(other.state_dict(), before)


def test_a_damaged_shard_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.packed.shards._LEAST_CODES", 1 << 14)
    model = converted(*(store(f"w{i}", (64, 300), seed=i) for i in range(4)), bias=torch.randn(4))
    path = save_packed(model, tmp_path / "m")
    data = bytearray(path.read_bytes())
    forgery = Forgery(data)
    data[forgery.body_start + len(forgery.body) - 50] ^= 1  # in the last of several shards
    path.write_bytes(data)
    twin, other = float_twin(model), converted(*(store(f"w{i}", (64, 300), seed=9) for i in range(4)), bias=torch.zeros(4))
    before = other.state_dict()
    for target in (twin, other):
        with pytest.raises(PackedFileError, match=r"is damaged: the checksum of shard \d \(with 'w3'\) does not fit"):
            load_packed(target, path)
    assert all((value == 7).all() for name, value in twin.named_parameters())
    assert_equal(other.state_dict(), before)
    assert torch.equal(load_packed(path, names=["w0"])["w0"], expected(model)["w0"])  # the rest can still be had


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    from diffq_fx.export.packed import loading

    model = small_model(large=torch.randn(130, 128))  # more than Python reads ahead
    path = save_packed(model, tmp_path / "m")

    original = loading._fill_model

    def cut_then_fill(model, reader):
        path.write_bytes(path.read_bytes()[:9000])
        original(model, reader)

    monkeypatch.setattr(loading, "_fill_model", cut_then_fill)
    twin = float_twin(model)
    with pytest.raises(PackedFileError, match="is cut short: expected"):
        load_packed(twin, path)
    assert (twin.a == 7).all()


def test_names_that_the_format_needs_are_refused(tmp_path):
    for name in ("diffq_fx/shard/0", "__metadata__"):
        with pytest.raises(PackedFileError, match=f"a tensor cannot be named '{name}'"):
            save_packed(converted(store(name, (4, 4))), tmp_path / "m")


def test_inspection_names_the_file(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"\0" * 100)
    with pytest.raises(DiffQError, match=r"'.*m': is not a packed file, or is damaged"):
        inspect_packed(path)
