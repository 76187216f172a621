"""Another program can read packed files: a reader written from docs/packed-format.md agrees with its test vectors, and with the package."""

import base64
import re
from pathlib import Path

import independent_reader
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import bits_of, converted, store, store_codes

from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed import ans, streams
from diffq_fx.export.packed.bitplanes import pack, planes, unpack
from diffq_fx.export.packed.container import Source
from diffq_fx.export.packed.dtypes import TENSOR_TYPES

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs/packed-format.md").read_text().split("\n## Test vectors\n")[1].split("\n## ")[0]
SEQUENCES = re.findall(r"^    (packed|stream|ans) ?(\d*): ([\d ]+) = (\w+)$", PAGE, re.MULTILINE)


def agree(path):
    """The independent reader and the package read the same from a file."""
    found = independent_reader.read(path)
    wanted = {
        name: (TENSOR_TYPES.name(value.dtype), tuple(value.shape), bits_of(value).numpy().tobytes())
        for name, value in load_packed(path).items()
    }
    assert found == wanted
    return found


@pytest.mark.parametrize(("kind", "width", "values", "data"), SEQUENCES)
def test_sequences_of_the_page(kind, width, values, data):
    values, data, width = [int(each) for each in values.split()], bytes.fromhex(data), int(width or 8)
    count = len(values)
    if kind == "packed":
        assert pack(np.array(values, np.uint8 if width <= 8 else np.uint16), width) == data
        ours, others = unpack(planes(data, width, count), width, count), independent_reader.unpack(data, width, count)[0]
    elif kind == "stream":
        source = Source(lambda start, stop: memoryview(data)[start:stop], 0, len(data))
        ours = streams.decode_block(source, len(data), [(width, count)])[0].values()
        others = independent_reader.streams(data, [(width, count)])[0]
    else:
        ours, others = ans.decode(memoryview(data), count), independent_reader.ans(data, count)
    assert list(ours) == list(others) == values


def test_the_page_has_all_kinds_of_sequences():
    heads = {int(data[:2], 16) & 3 for kind, _, _, data in SEQUENCES if kind == "stream"}
    assert ({kind for kind, *_ in SEQUENCES}, heads) == ({"packed", "stream", "ans"}, {0, 1, 2})


def test_the_file_of_the_page(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(base64.b64decode("".join(re.findall(r"^    ([\w+/=]{20,})$", PAGE, re.MULTILINE))))
    told = re.findall(r"^    tensor (\w+): (\w+) \[([\d, ]*)\] = (\w+)$", PAGE, re.MULTILINE)
    wanted = {name: (dtype, tuple(map(int, re.findall(r"\d+", shape))), bytes.fromhex(data)) for name, dtype, shape, data in told}
    assert agree(path) == wanted
    assert {"w", "e"} < wanted.keys()


@pytest.mark.parametrize("name", ["bits", "entropy", "half"])
def test_stored_files(name):
    assert agree(HERE / "stored" / f"{name}.safetensors")


SHAPES = (((6, 10), 0), ((5, 11, 3), 1), ((1, 7), 0), ((9, 1), 0), ((3, 200), 0), ((16, 40), 1))
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@st.composite
def weights(draw, name):
    """A stored weight of any kind."""
    shape, axis = draw(st.sampled_from(SHAPES))
    common = {"axis": axis, "dtype": draw(st.sampled_from(TYPES)), "seed": draw(st.integers(0, 999))}
    if draw(st.booleans()):
        entries = {"entries": draw(st.sampled_from((1, 2, 3, 16, 300))), "block": draw(st.sampled_from((1, 2, 3, 7)))}
        return store_codes(name, shape, entry_dtype=draw(st.sampled_from((*TYPES, torch.int8))), **entries, **common)
    grid = draw(st.sampled_from(("affine", "half", "symmetric", "float")))
    group = draw(st.sampled_from(("tensor", "channel", 1, 3, 8)))
    ranges = draw(st.sampled_from((group, "tensor", "channel")))
    bits = draw(st.one_of(st.integers(2, 16), st.tuples(st.integers(1 + (grid == "symmetric"), 8), st.integers(8, 16))))
    numbers = {"spread": draw(st.sampled_from((1.0, 1e-3, 1e3))), "scale_dtype": draw(st.sampled_from((torch.float32, torch.float16)))}
    return store(name, shape, bits=bits, group=group, ranges=ranges, grid=grid, **numbers, **common)


@settings(deadline=None, max_examples=40)
@given(
    first=weights("a.weight"), second=weights("b"), compression=st.sampled_from(("entropy", "bits")), size=st.sampled_from((1, 7, 17_000))
)
def test_files_of_all_kinds(tmp_path_factory, first, second, compression, size):
    model = converted(first, second, bias=torch.randn(size), halves=torch.randn(size).half().float(), ids=torch.arange(size) % 200)
    agree(save_packed(model, tmp_path_factory.mktemp("packed") / "m", compression))


@pytest.mark.parametrize(
    ("group", "ranges", "grid"), [("tensor", "tensor", "affine"), ("channel", "tensor", "float"), (65536, "channel", "half")]
)
def test_weights_of_several_parts(tmp_path, group, ranges, grid):
    model = converted(store("a", (3, 600_000), bits=(2, 5), group=group, ranges=ranges, grid=grid))
    agree(save_packed(model, tmp_path / "m", "bits"))
