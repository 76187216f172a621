"""Calls that are not what was meant: one sentence of our own that says what to do, and nothing written."""

from pathlib import Path

import pytest
import torch
from packed_models import assert_equal, converted, expected, float_twin, store
from safetensors.torch import save_file
from torch import nn

from diffq_fx import DiffQConfig, DiffQError, DiffQWarning, convert_diffq, prepare_diffq
from diffq_fx.cli import app
from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed.packed_report import inspect_packed
from diffq_fx.export.packed.state_dicts import pack_state_dict, unpack_state_dict


@pytest.fixture
def sound(tmp_path):
    """A packed file, alone in its folder, and its model."""
    model = converted(store("w", (8, 40)), store("v", (4, 4)))
    (tmp_path / "sound").mkdir()
    return save_packed(model, tmp_path / "sound" / "m.safetensors"), model


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("w", r"names must be a collection of names such as \['w'\], got the text 'w'"),
        (b"w", "names must be a collection of names, got bytes"),
        (3, "names must be a collection of names, got int"),
        (["w", 3], "names must be a collection of names, got 3 among them"),
    ],
)
def test_names_that_are_no_collection_of_names(sound, names, message):
    with pytest.raises(TypeError, match=f"load_packed: {message}"):
        load_packed(sound[0], names=names)


@pytest.mark.parametrize("names", [["w"], ("w",), {"w"}, {"w": 1}.keys()], ids=["list", "tuple", "set", "keys"])
def test_any_collection_of_names_will_do(sound, names):
    assert_equal(load_packed(sound[0], names=names), {"w": expected(sound[1])["w"]})


def test_unknown_names_are_told_with_some_that_are_there(sound):
    with pytest.raises(DiffQError, match=r"there is no tensor 'x' in the file; it has 'v', 'w'"):
        load_packed(sound[0], names=["w", "x"])


def test_a_packed_file_is_not_packed_again(sound, tmp_path):
    source, target = sound[0], tmp_path / "again"
    with pytest.raises(DiffQError, match=r"is packed already.*unpack it first"):
        pack_state_dict(source, target, bits=4, group_size="channel")
    with pytest.raises(DiffQError, match=r"is packed already.*unpack it first"):
        pack_state_dict(source, source.parent / "x" / ".." / "y", bits=4, group_size="channel")
    assert not target.exists()


NAMES = {
    "a NUL": "a\0b",
    "text that is no file name": "\ud800",
    "too long a name": "x" * 300,
    "no name": "",
    "a folder": ".",
    "a folder that is missing": "no/such/folder/x",
    "a file as a folder": "sound/m.safetensors/x",
}
WRITERS = {
    "save_packed": lambda source, target: save_packed(converted(store("w", (8, 40))), target),
    "pack": lambda source, target: pack_state_dict(Path("float"), Path(target), bits=4, group_size="channel"),
    "unpack": lambda source, target: unpack_state_dict(source, Path(target)),
}
READERS = {
    "load_packed": load_packed,
    "load_packed into a model": lambda path: load_packed(nn.Linear(2, 2), path),
    "inspect": inspect_packed,
    "pack": lambda path: pack_state_dict(Path(path), Path("out"), bits=4, group_size="channel"),
    "unpack": lambda path: unpack_state_dict(Path(path), Path("out")),
}


def everything_below(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_names_that_no_file_can_be_written_to(sound, tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.randn(4, 40)}, "float")
    before = everything_below(tmp_path)
    with pytest.raises(DiffQError, match=r"cannot (write|be)") as caught:
        write(sound[0], name)
    assert str(caught.value).endswith(".")
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_names_that_no_file_can_be_read_from(sound, tmp_path, monkeypatch, name, read):
    monkeypatch.chdir(tmp_path)
    before = everything_below(tmp_path)
    with pytest.raises(DiffQError, match=r"cannot be (opened|read)|can be read|is a folder") as caught:
        read(name)
    assert str(caught.value).endswith(".")
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("path", [3, None, b"x"])
def test_paths_that_are_no_text(path):
    with pytest.raises(TypeError, match=f"save_packed: path must be a str or a Path, got {type(path).__name__}"):
        save_packed(converted(store("w", (8, 40))), path)
    with pytest.raises(TypeError, match=f"inspect_packed: path must be a str or a Path, got {type(path).__name__}"):
        inspect_packed(path)


def test_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match="save_packed: model must be a torch.nn.Module, got dict"):
        save_packed({"w": torch.zeros(2)}, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_it_in_one_line(sound, tmp_path):
    from typer.testing import CliRunner

    for arguments in (("pack", sound[0], tmp_path / "out"), ("unpack", sound[0], tmp_path), ("inspect", tmp_path / ("x" * 300))):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert (result.exit_code, result.stderr.count("\n"), "Traceback" in result.stderr) == (2, 1, False), result.stderr


# Wrappers of several parts


def part(inputs, outputs, convert=True):
    torch.manual_seed(inputs)
    prepared = prepare_diffq(nn.Linear(inputs, outputs), torch.zeros(1, inputs), DiffQConfig(target_bits=None, min_size=0))
    if not convert:
        return prepared
    with pytest.warns(DiffQWarning, match="never moved"):
        return convert_diffq(prepared)


class Wrapper(nn.Module):
    """Two parts, one of them under two names, and a head of its own."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.again = first, second, first
        self.head = nn.Linear(32, 2)


def test_a_wrapper_of_several_parts_is_saved_whole(tmp_path):
    model = Wrapper(part(32, 64), part(64, 32))
    path = save_packed(model, tmp_path / "m.safetensors")
    plain = Wrapper(nn.Linear(32, 64), nn.Linear(64, 32))
    tensors = load_packed(path)
    assert tensors.keys() == plain.state_dict().keys()
    assert tensors["first.weight"] is tensors["again.weight"]
    assert_equal(load_packed(plain, path).state_dict(), tensors)
    assert torch.equal(plain.second.weight, model.second.weight_quantized())
    other = Wrapper(part(32, 64), part(64, 32))
    for module in (other.first.weight_quantized, other.second.weight_quantized):
        module.levels.zero_()
    assert_equal(load_packed(other, path).state_dict(), model.state_dict())
    assert other.first.weight_quantized is other.again.weight_quantized
    assert other.second.weight_quantized.spec == model.second.weight_quantized.spec, "its name is that in its part"


def test_a_wrapper_with_a_part_that_is_not_converted_is_refused_by_its_name(tmp_path):
    for model, name in (
        (Wrapper(part(32, 64), part(64, 32, convert=False)), "second"),
        (nn.ModuleDict({"inner": nn.Sequential(part(32, 64, convert=False)), "outer": part(64, 32)}), "inner.0"),
    ):
        with pytest.raises(DiffQError, match=rf"save_packed: '{name}' \(Linear\) is prepared, not converted\. Call convert_diffq"):
            save_packed(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_filled_inside_its_wrapper(sound):
    path, model = sound
    wrapped = load_packed(nn.DataParallel(float_twin(model)), path)
    assert_equal(wrapped.module.state_dict(), expected(model))
