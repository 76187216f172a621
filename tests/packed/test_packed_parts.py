"""What a writer decides on its way: shards, places, forms of scales and zero points, each against one written out plainly."""

import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packed_models import converted, store, store_codes

from diffq_fx.errors import PackedFileError
from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed import integer_scales as scales
from diffq_fx.export.packed.codebook_kind import PackedCodebook
from diffq_fx.export.packed.container import Source, container_of, is_integers, is_shape
from diffq_fx.export.packed.dtypes import bytes_of, can_stand_for, tensor_of
from diffq_fx.export.packed.header import small_size
from diffq_fx.export.packed.integer_kind import PackedIntegers
from diffq_fx.export.packed.shards import Span, plan_shards, shard_size
from diffq_fx.weights import WeightSpec


def shaped(*shapes):
    return [SimpleNamespace(spec=WeightSpec(name=str(i), shape=shape, axis=0)) for i, shape in enumerate(shapes)]


MIB = 2**20


@pytest.mark.parametrize(
    ("shapes", "number"),
    [
        ([(100, 10)], 1),
        ([(2048, 1024)], 1),
        ([(2049, 1024)], 2),
        ([(1024, 5 * 1024), (1024, 3 * 1024)], 4),
        ([(1024, 12 * 1024), (3, 5), (1024, 12 * 1024)], 4),
        ([(40 * 1024, 1024)], 5),
        ([(64, 1024 * 1024)], 8),
        ([(3965, 4096), (1467, 100_000), (3653, 64)], 20),
    ],
)
def test_rows_are_divided_into_shards_of_about_equal_size(shapes, number):
    weights = shaped(*shapes)
    shards = plan_shards(weights)
    assert len(shards) == number
    rows = [0] * len(shapes)
    for span in (span for spans in shards for span in spans):
        assert span.first_row == rows[span.weight]
        assert span.rows > 0
        rows[span.weight] += span.rows
    assert rows == [shape[0] for shape in shapes]
    sizes = [sum(span.rows * shapes[span.weight][1] for span in spans) for spans in shards]
    longest_row = max(columns for _, columns in shapes)
    assert max(sizes) - min(sizes) <= longest_row
    order = [span.weight for spans in shards for span in spans]
    assert order == sorted(order)


def test_a_shard_is_filled_up_to_a_byte_for_128_weights():
    weights = shaped((10, 130), (5, 7))
    spans = [Span(0, 0, 9), Span(1, 0, 5)]
    assert shard_size([1, 2], spans, weights) == -(-(9 * 130 + 5 * 7) // 128) == 10
    assert shard_size([1, 2, 8], spans, weights) == 11
    assert (small_size(3, 129), small_size(3, 128), small_size(0, 128 * 4)) == (3, 3, 4)
    assert small_size(0, 129) == 2


def test_tensors_lie_at_multiples_of_their_items(tmp_path):
    model = converted(
        store("a", (5, 7)),
        store_codes("e", (6, 21), entries=5, block=2),
        bytes_=torch.arange(70_001) % 251,
        narrow=torch.randn(40_001).half().float(),
        wide=torch.randn(10_001).double(),
        single=torch.randn(20_001),
        edge=torch.randn(2**14),  # as few bytes as a tensor that lies by itself may have
    )
    data = save_packed(model, tmp_path / "m").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    assert (8 + length) % 8 == 0
    items = {"F64": 8, "F32": 4, "I64": 8, "F16": 2, "U8": 1, "I16": 2}
    assert all(entry["data_offsets"][0] % items[entry["dtype"]] == 0 for entry in header.values())
    begin, end = (8 + length + offset for offset in header["diffq_fx/contents"]["data_offsets"])
    contents = json.loads(zlib.decompress(data[begin:end], -15))
    assert contents["tensors"] == {"bytes_": {"dtype": "I64"}}, "all others are what they seem"
    assert contents["small_section"] == []
    assert {header[name]["dtype"] for name in ("bytes_", "narrow", "wide", "single")} == {"U8", "F16", "F64", "F32"}


@pytest.mark.parametrize(
    ("zero_points", "widths", "form"),
    [
        ([2, 8], [2, 4], "middle"),
        ([1.5, 7.5], [2, 4], "centre"),
        ([4, 15], [2, 4], "plain"),  # above what two bits hold
        ([0, 15], [2, 4], "coded"),
        ([0, 3], [2, 2], "coded"),
        ([0, -1], [2, 2], "plain"),
        ([0.5, 3], [2, 2], "halves"),
        ([0.5, 3.5], [2, 2], "plain"),
        ([0.25, 3], [2, 2], "plain"),
        ([0.5, 1], [16, 2], "plain"),
        ([0.5, 1], [15, 2], "halves"),
    ],
)
def test_the_form_of_zero_points(zero_points, widths, form):
    tensor = torch.tensor(zero_points, dtype=torch.float32)[:, None]
    assert scales.zero_point_form(tensor, np.array(widths, np.uint8)[:, None]) == form
    assert scales.zero_point_form(None, np.array(widths, np.uint8)[:, None]) == "none"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(5))
def test_extents_that_give_every_scale_are_found(dtype, seed):
    generator = np.random.default_rng(seed)
    extents = (generator.random((50, 1)) * 10.0 ** generator.integers(-6, 6, (50, 1))).astype(dtype)
    extents[7] = 0
    widths = generator.integers(1, 17, (50, 6)).astype(np.uint8)
    given = (extents / (2.0 ** widths.astype(dtype) - 1)).astype(dtype)
    given[7] = 1
    assert np.array_equal(scales.scales_of(extents, widths), given)
    found = scales.find_extents(given, widths)
    assert np.array_equal(scales.scales_of(found, widths), given)
    assert found[7] == 0
    given[3, 2] *= dtype(1.01)
    assert scales.find_extents(given, widths) is None


@pytest.mark.parametrize("range_size", ["channel", "tensor"])
def test_a_cell_is_a_range_and_a_width_that_occur_together(range_size):
    own = WeightSpec(name="w", shape=(4, 12), axis=0, group_size=4, range_size=range_size)
    widths = np.array([[2, 3, 2], [5, 5, 5], [3, 2, 16], [1, 16, 1]], np.uint8)
    pairs = [(0 if range_size == "tensor" else row, int(width)) for row, of_row in enumerate(widths) for width in of_row]
    expected = sorted(set(pairs))
    found, of_group = scales.cells(widths, own)
    assert found.tolist() == [width for _, width in expected]
    assert of_group.tolist() == [expected.index(pair) for pair in pairs]
    assert scales.by_range((4, 3), own) == ((1, 12) if range_size == "tensor" else (4, 3))


def test_extents_are_for_ranges_with_several_groups():
    def may(group_size, range_size, dtype=torch.float32):
        return scales.may_have_extents(WeightSpec(name="w", shape=(4, 12), axis=0, group_size=group_size, range_size=range_size), dtype)

    assert may(4, "channel")
    assert may(4, "tensor", torch.float64)
    assert may("channel", "tensor")
    assert not may("channel", "channel")
    assert not may(2, 4)
    assert not may(4, "channel", torch.float16)


FACTS = {"entries": 5, "block_size": 2, "entry_dtype": "F32", "scale": 0.5}


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"entries": 0}, "0 entries, 1 to 65536 are possible"),
        ({"entries": 65537}, "65537 entries"),
        ({"entries": True}, "True entries"),
        ({"entries": 5.0}, "5.0 entries"),
        ({"block_size": 0}, "block size 0 is not possible"),
        ({"block_size": 1 << 40}, "block size 1099511627776"),
        ({"block_size": "2"}, "block size 2"),
        ({"scale": float("inf")}, "scale inf is not a float32"),
        ({"scale": 1}, "scale 1 is not a float32"),
        ({"scale": 0.1}, "scale 0.1 is not a float32"),
        ({"entry_dtype": "I64"}, "expected one of the types F32, F16, BF16, F64, I8, got 'I64'"),
    ],
)
def test_facts_of_a_codebook_are_checked(facts, match):
    own = WeightSpec(name="w", shape=(4, 7), axis=0)
    with pytest.raises(PackedFileError, match=match):
        PackedCodebook.of_facts(own, FACTS | facts)
    for sound in ({}, {"entries": 1}, {"entries": 65536}, {"block_size": 1}, {"block_size": (1 << 40) - 1}, {"scale": None}):
        packed = PackedCodebook.of_facts(own, FACTS | sound)
        expected = {name: value for name, value in (FACTS | sound).items() if value is not None}
        assert packed.facts() == expected
        assert packed.layout.columns == -(-7 // expected["block_size"])
        assert packed.description == f"codebook {expected['entries']}x{expected['block_size']} F32"


def test_bytes_are_taken_once_and_in_order():
    data = bytes(range(100)) + bytes(2**16)
    source = Source(lambda start, stop: data[start:stop], 10, len(data))
    assert bytes(source.take(5)) == data[10:15]
    assert source.left == len(data) - 15
    with pytest.raises(PackedFileError, match=f"it ends early: {len(data)} bytes are wanted, {len(data) - 15} are left"):
        source.take(len(data))
    with pytest.raises(PackedFileError, match="hidden in the zeros"):
        source.skip(zeros=True)
    source = Source(lambda start, stop: data[start:stop], 100, len(data))
    source.skip(zeros=True)
    assert source.left == 0


def test_json_values_that_are_numbers_and_shapes():
    assert is_integers([0, 9], 10)
    assert is_integers([], 10)
    assert not any(is_integers(value, 10) for value in ([10], [-1], [True], [1.0], ["1"], (1,), None))
    assert is_integers([1, 2], 10, 2)
    assert not is_integers([1, 2], 10, 3)
    assert is_shape([1] * 64, 2)
    assert not is_shape([1] * 65, 2)


def test_which_types_stand_for_others():
    integers = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32]
    assert all(can_stand_for(each, torch.int64) for each in integers)
    assert [can_stand_for(each, torch.int32) for each in integers] == [True] * 4 + [False]
    assert can_stand_for(torch.float16, torch.float32)
    assert not any(
        can_stand_for(*pair) for pair in ((torch.float32, torch.float16), (torch.int64, torch.int64), (torch.float16, torch.float64))
    )
    assert not any(
        can_stand_for(*pair) for pair in ((torch.bfloat16, torch.float32), (torch.int8, torch.float32), (torch.float16, torch.int64))
    )


def test_pieces_of_a_container():
    pieces = container_of([("x", "U8", [3], b"abc")], {"a": 1})
    (length,) = struct.unpack("<Q", pieces[0][:8])
    assert length == len(pieces[0]) - 8
    assert length % 8 == 0
    assert b" " not in pieces[0][8:].rstrip()
    header = json.loads(pieces[0][8:])
    assert header["__metadata__"] == {"format": "diffq_fx.packed", "version": "1"}
    assert header["x"] == {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert [begin for begin, _ in ends[1:]] == [end for _, end in ends[:-1]]
    assert ends[-1][1] == sum(map(len, pieces[1:]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weight: weight.bits.fill_(17), "widths must be from 1 to 16 bits, got 17 to 17"),
        (lambda weight: weight.bits[1].fill_(0), "widths must be from 1 to 16 bits, got 0 to"),
        (lambda weight: setattr(weight, "bits", weight.bits[:3]), r"bits has the shape \(3, 1\), the spec says \(5, 1\)"),
        (
            lambda weight: setattr(weight, "zero_point", weight.zero_point.float()),
            "zero_point is torch.float32, the grid 'affine' has torch.int32",
        ),
        (lambda weight: weight.levels.fill_(255), "a level does not fit the width of its group"),
    ],
)
def test_a_weight_that_is_not_what_its_spec_says_is_not_written(tmp_path, change, match):
    model = converted(store("a", (5, 7), bits=5))
    change(model.a_quantized)
    with pytest.raises(PackedFileError, match=f"weight 'a': {match}|{match}"):
        save_packed(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_bytes_of_tensors(monkeypatch):
    assert tensor_of(b"", torch.int64, (0, 3)).dtype == torch.int64
    assert tensor_of(b"\1\0", torch.bool, (2,)).tolist() == [True, False]
    with pytest.raises(PackedFileError, match="a bool is stored as 2"):
        tensor_of(b"\2", torch.bool, (1,))
    monkeypatch.setattr("sys.byteorder", "big")
    for call in (lambda: bytes_of(torch.ones(1)), lambda: tensor_of(b"\0" * 4, torch.float32, (1,))):
        with pytest.raises(PackedFileError, match="little endian machines only"):
            call()


def test_half_integer_zero_points_have_widths_of_their_own():
    own = WeightSpec(name="w", shape=(4, 7), axis=0, grid="half")
    packed = PackedIntegers(own, torch.float32, "groups", "halves")
    assert packed.integer_widths(np.full((4, 1), 15, np.uint8), 4).tolist() == [16] * 4
    with pytest.raises(PackedFileError, match="half-integer zero points of more than 15 bits"):
        packed.integer_widths(np.full((4, 1), 16, np.uint8), 4)


@pytest.mark.parametrize("entries", [1, 2, 3, 4, 5, 6, 8])
def test_codes_that_index_no_entry_are_refused(entries):
    packed = PackedCodebook.of_facts(WeightSpec(name="w", shape=(4, 7), axis=0), FACTS | {"entries": entries})
    width = max((entries - 1).bit_length(), 1)
    packed.check_widths(np.full((1, 1), width, np.uint8))
    with pytest.raises(PackedFileError, match=f"codes of {width + 1} bits do not index {entries} entries"):
        packed.check_widths(np.full((1, 1), width + 1, np.uint8))
    packed.check_codes(SimpleNamespace(codes=np.array([[entries - 1]])))
    if entries < 2**width:  # all that so many bits hold
        with pytest.raises(PackedFileError, match=f"a code of 'w' is {entries}, it has {entries} entries"):
            packed.check_codes(SimpleNamespace(codes=np.array([[entries]])))


def test_a_weight_of_one_value(tmp_path):
    model = converted(store("a", (1, 1)))
    assert torch.equal(load_packed(save_packed(model, tmp_path / "m"))["a"], model.a_quantized())


def test_zero_points_that_no_float32_holds_come_back(tmp_path):
    model = converted(store("a", (5, 7), bits=5))
    model.a_quantized.zero_point.fill_(2**24 + 1)
    assert torch.equal(load_packed(save_packed(model, tmp_path / "m"))["a"], model.a_quantized())
