"""pack, unpack and inspect on the command line."""

import json

import pytest
import torch
from packed_models import assert_equal, converted, expected, store
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffq_fx.cli import app
from diffq_fx.errors import PackedFileError
from diffq_fx.export import load_packed, save_packed


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def packed(tmp_path):
    model = converted(
        store("layer.weight", (64, 300), aliases=("head.weight",)),
        store("other[0].weight", (40, 40), group=8),
        small=torch.randn(3),
        large=torch.randn(3000),
    )
    return save_packed(model, tmp_path / "model.bin"), model  # found by its contents, not by its name


def test_inspect_shows_widths_entropy_and_overhead(packed):
    path, _ = packed
    result = invoke("inspect", path)
    assert result.exit_code == 0, result.stderr
    for text in ("learned bits", "entropy MiB", "overhead %", "layer.weight", "= head.weight", "other[0].weight", "8, affine", "2-8"):
        assert text in result.stdout
    for text in ("large", "F32", "and 1 small ones", "names, models, checksums", "format version 1; 1 shards"):
        assert text in result.stdout
    assert "small  " in invoke("inspect", path, "--all").stdout


def test_inspect_json(packed):
    path, model = packed
    entries = json.loads(invoke("inspect", path, "--json").stdout)
    assert entries["file_bytes"] == path.stat().st_size
    assert [weight["name"] for weight in entries["weights"]] == ["layer.weight", "other[0].weight"]
    bits = entries["weights"][0]["bits"]
    assert (
        sum(int(width) * count for width, count in bits.items()) == model.get_submodule("layer.weight_quantized").footprint().payload_bits
    )


def test_unpack_writes_a_state_dict(packed, tmp_path):
    path, model = packed
    result = invoke("unpack", path, tmp_path / "float.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "MiB" in result.stdout
    assert_equal(load_file(tmp_path / "float.safetensors"), expected(model))
    with safe_open(tmp_path / "float.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "which transformers asks for"


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
@pytest.mark.parametrize("compression", ["entropy", "bits"])
def test_pack_rounds_to_the_nearest_level(tmp_path, bits, compression):
    tensors = {
        "a.weight": torch.randn(30, 200),
        "b.weight": torch.randn(8, 4, 3, 3).half(),
        "a.bias": torch.randn(30),
        "n": torch.tensor(3),
    }
    tensors["table"] = torch.arange(6).reshape(2, 3)
    source, target = tmp_path / "float.safetensors", tmp_path / "packed.safetensors"
    save_file(tensors, source)
    result = invoke("pack", source, target, "--bits", bits, "--group-size", "16", "--compression", compression)
    assert result.exit_code == 0, result.stderr
    assert "times smaller" in result.stdout
    assert "as they were: table" in result.stdout
    found = load_packed(target)
    for name in ("a.bias", "n", "table"):
        assert torch.equal(found[name], tensors[name])
    blocks = tensors["a.weight"][:, :192].reshape(30, 12, 16)
    scale = (blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)) / (2**bits - 1)
    error = (found["a.weight"][:, :192].reshape(30, 12, 16) - blocks).abs().amax(-1)
    assert (error <= scale * 0.5001 + 1e-6).all()
    assert found["b.weight"].dtype == torch.float16
    unpacked = tmp_path / "again.safetensors"
    assert invoke("unpack", target, unpacked).exit_code == 0
    assert_equal(load_file(unpacked), found)


def test_pack_says_the_error_that_it_made(tmp_path):
    tensors = {"good": torch.randint(0, 4, (30, 200)).float(), "poor": torch.randn(30, 40), "zero": torch.zeros(4, 4), "b": torch.randn(4)}
    save_file(tensors, source := tmp_path / "float.safetensors")
    target = tmp_path / "packed"
    answer = json.loads(invoke("pack", source, target, "--bits", 2, "--group-size", "tensor", "--json").stdout)
    found, told = load_packed(target), {weight["name"]: weight["relative_squared_error"] for weight in answer["weights"]}
    squares = {name: ((found[name] - tensors[name]).square().sum(), tensors[name].square().sum()) for name in told}
    assert told == {name: pytest.approx(float(error / (whole or 1)), rel=1e-4) for name, (error, whole) in squares.items()}
    overall = sum(error for error, _ in squares.values()) / sum(whole for _, whole in squares.values())
    assert answer["relative_squared_error"] == pytest.approx(float(overall), rel=1e-4)
    assert told["good"] < 1e-9 < told["poor"]
    assert answer["file_bytes"] == target.stat().st_size
    printed = " ".join(invoke("pack", source, target, "--bits", 2, "--group-size", "tensor").stdout.split())
    assert f"{overall:.3g} over all weights, at most {told['poor']:.3g}, of 'poor'" in printed


def test_pack_leaves_out_what_is_excluded(tmp_path):
    source, target = tmp_path / "float.safetensors", tmp_path / "packed.safetensors"
    save_file({"a": torch.randn(4, 40), "b": torch.randn(4, 40)}, source)
    result = invoke("pack", source, target, "--exclude", "b*", "--grid", "symmetric", "--bits", "3")
    assert "as they were: b" in result.stdout
    invoke("pack", source, half := tmp_path / "half.safetensors", "--grid", "half", "--bits", "2")
    assert "channel, half" in invoke("inspect", half).stdout
    found = load_packed(target)
    assert len(found["a"][0].unique()) <= 8
    assert torch.equal(found["b"], load_file(source)["b"])


@pytest.mark.parametrize(
    ("tensors", "exclude"),
    [
        ({"b": torch.randn(40), "scalar": torch.zeros(())}, ()),
        ({"w": torch.zeros(3000, dtype=torch.uint8), "ids": torch.zeros(4, 4, dtype=torch.int64)}, ()),  # as in a folder that is compressed
        ({"w": torch.randn(4, 40)}, ("--exclude", "w")),
        ({}, ()),
    ],
    ids=["one dimension", "integers", "excluded", "no tensors"],
)
def test_pack_without_a_weight_to_round(tensors, exclude, tmp_path):
    save_file(tensors, source := tmp_path / "float.safetensors")
    result = invoke("pack", source, tmp_path / "out", *exclude)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"has nothing to round: none of its {len(tensors)} tensors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_errors_are_one_message_and_exit_code_2(tmp_path):
    garbage, pickled, source, out = (tmp_path / name for name in ("garbage", "pickled", "float.safetensors", "out"))
    torch.save({"a": torch.randn(4, 4)}, pickled)
    garbage.write_bytes(b"\x10\0\0\0\0\0\0\0{garbage")
    save_file({"a": torch.full((4, 4), float("nan")), "b": torch.randn(4, 4)}, source)
    cases = {
        ("inspect", garbage): "is not a packed file, or is damaged",
        ("inspect", source): "is a safetensors file without what save_packed adds to one",
        ("unpack", source, out): "is a safetensors file without what save_packed adds to one",
        ("unpack", tmp_path / "missing", out): "cannot be opened: No such file",
        ("pack", garbage, out): "is not a safetensors file that can be read",
        ("pack", pickled, out): "a safetensors file is wanted",
        ("pack", tmp_path / "missing", out): "is not a safetensors file that can be read",
        ("pack", source, out): "weight 'a' of shape (4, 4) has values that are not finite",
        ("pack", source, out, "--bits", "17"): "bits must be from 1 to 16, got 17",
        ("pack", source, out, "--group-size", "row"): 'the group size is "tensor", "channel" or a number from 1, got \'row\'',
        ("pack", source, out, "--exclude", "c"): "the pattern 'c' matches no tensor",
        ("pack", source, tmp_path / "no" / "out", "--exclude", "a"): "No such file or directory",
    }
    for arguments, message in cases.items():
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("diffq-fx: ")
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize("command", ["pack", "unpack"])
@pytest.mark.parametrize("kind", ["the same name", "another way to write it", "symbolic link", "hard link"])
def test_a_file_is_not_written_over_itself(command, kind, packed, tmp_path):
    source = packed[0]
    if command == "pack":
        source = tmp_path / "float.safetensors"
        save_file({"w": torch.randn(64, 64)}, source)
    target = tmp_path / "out" / "target.safetensors"
    target.parent.mkdir()
    if kind == "symbolic link":
        target.symlink_to(source)
    elif kind == "hard link":
        target.hardlink_to(source)
    else:
        target = source if kind == "the same name" else target.parent / ".." / source.name
    before = source.read_bytes()
    result = invoke(command, source, target)
    assert result.exit_code == 2
    assert "is the same file as" in result.stderr
    assert source.read_bytes() == before


def test_control_characters_in_names_are_shown_not_obeyed(tmp_path):
    clear = "\x1b[2J"
    path = save_packed(converted(store(f"w{clear}", (4, 4)), **{f"b\r{clear}": torch.zeros(3)}), tmp_path / "m")
    found = CliRunner().invoke(app, ["inspect", str(path), "--all"])
    assert found.exit_code == 0
    assert {r"w\x1b[2J", r"b\r\x1b[2J"} <= set(found.output.split())
    with pytest.raises(PackedFileError, match=r"there is no tensor 'x' in the file; it has 'b\\r\\x1b\[2J', 'w\\x1b\[2J'"):
        load_packed(path, names=["x"])
