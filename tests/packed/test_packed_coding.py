"""Bit planes, the entropy coder and blocks of streams: every width and every length comes back, and at its entropy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed import ans, deflate
from diffq_fx.export.packed.bitplanes import pack, packed_size, planes, unpack
from diffq_fx.export.packed.classes import BINS, CodeClass, Histogram, bins_of, class_table
from diffq_fx.export.packed.container import Source
from diffq_fx.export.packed.streams import ANS, DEFLATE, Effort, Stream, decode_block, encode_block
from diffq_fx.export.packed.unpacking import Grouping

WIDTHS = st.integers(1, 16)


def streams_of(block, expected):
    """The streams of a block."""
    return decode_block(Source(lambda start, stop: memoryview(block)[start:stop], 0, len(block)), len(block), expected)


def values_of(width, count, seed, peaked=False):
    generator = np.random.default_rng(seed)
    values = np.minimum(generator.geometric(0.4, count) - 1, 2**width - 1) if peaked else generator.integers(0, 2**width, count)
    return values.astype(np.uint8 if width <= 8 else np.uint16)


@settings(deadline=None)
@given(width=WIDTHS, count=st.integers(0, 100), seed=st.integers(0, 999))
def test_bit_planes_hold_values_in_their_bits(width, count, seed):
    values = values_of(width, count, seed)
    packed = pack(values, width)
    assert len(packed) == packed_size(count, width)
    assert packed_size(8 * count, width) == count * width
    assert np.array_equal(unpack(planes(packed, width, count), width, count), values)


@settings(deadline=None, max_examples=60)
@given(coder=st.sampled_from([ans, deflate]), count=st.integers(1, 50000), width=st.integers(1, 8), seed=st.integers(0, 999))
def test_coders_give_back_symbols(coder, count, width, seed):
    symbols = values_of(width, count, seed, peaked=seed % 2 == 0)
    assert np.array_equal(coder.decode(memoryview(coder.encode(symbols)), count), symbols)


@pytest.mark.parametrize("coder", [ans, deflate])
@pytest.mark.parametrize("only", [0, 255])
def test_one_symbol_alone_takes_next_to_nothing(coder, only):
    symbols = np.full(40000, only, np.uint8)
    coded = coder.encode(symbols)
    assert len(coded) < 600 + 40000 / 8 * (coder is deflate)
    assert np.array_equal(coder.decode(memoryview(coded), 40000), symbols)


@pytest.mark.parametrize("coder", [ans, deflate])
def test_the_expected_length_is_near_the_real_one(coder):
    symbols = values_of(5, 200_000, 0, peaked=True)
    shares = np.bincount(symbols) / len(symbols)
    assert abs(coder.estimated_bits(shares[shares > 0], len(symbols)) / 8 / len(coder.encode(symbols)) - 1) < 0.002


def entropy_bytes(values):
    counts = np.bincount(values)
    share = counts[counts > 0] / len(values)
    return -(share @ np.log2(share)) * len(values) / 8


@pytest.mark.parametrize(("width", "scale"), [(2, 0.4), (3, 0.5), (4, 0.9), (4, 2.0), (5, 1.0), (5, 4.0), (8, 2.0), (8, 30.0), (12, 500.0)])
def test_a_stream_is_as_long_as_its_entropy(width, scale):
    drawn = np.rint(np.random.default_rng(0).laplace(size=2_000_000) * scale)
    values = np.minimum(np.where(drawn < 0, -2 * drawn - 1, 2 * drawn), 2**width - 1).astype(np.uint8 if width <= 8 else np.uint16)
    block = encode_block([Stream(width, values)], Effort(True))
    assert 0.999 * entropy_bytes(values) < len(block) < 1.02 * entropy_bytes(values) + 100
    assert np.array_equal(streams_of(block, [(width, len(values))])[0].values(), values)


@settings(deadline=None, max_examples=200)
@given(
    streams=st.lists(st.tuples(WIDTHS, st.sampled_from([0, 1, 2, 7, 64, 1000, 5000, 70000]), st.booleans()), max_size=6),
    entropy=st.booleans(),
    seed=st.integers(0, 999),
)
def test_blocks_give_back_streams(streams, entropy, seed):
    given = [Stream(width, values_of(width, count, seed + i, peaked)) for i, (width, count, peaked) in enumerate(streams)]
    block = encode_block(given, Effort(entropy))
    found = streams_of(block, [(stream.width, len(stream.values)) for stream in given])
    for stream, decoded in zip(given, found, strict=True):
        assert np.array_equal(decoded.values(), stream.values)
        assert decoded.values().dtype == stream.values.dtype


def coded_block(coder):
    """A block of one stream that this coder has coded."""
    values = values_of(4, 160000, 0, peaked=True)
    values = (values > 2).astype(np.uint8) if coder == ANS else np.minimum(values, 11)
    block = encode_block([Stream(4, values)], Effort(True))
    assert block[0] & 3 == coder
    return block, [(4, 160000)]


@pytest.mark.parametrize("coder", [DEFLATE, ANS])
def test_blocks_of_another_size_are_refused(coder):
    block, expected = coded_block(coder)
    for cut in (0, 1, 4, 5, 7, 40, 200, len(block) - 1):
        with pytest.raises(PackedFileError, match="ends early"):
            streams_of(block[:cut], expected)
    with pytest.raises(PackedFileError, match=r"take \d+ bytes, it has \d+"):
        streams_of(block + b"x", expected)
    for count in (10, 140000, 150000, 161000):
        with pytest.raises(PackedFileError, match=r"does not hold|coded|ends early|it has"):
            streams_of(block, [(4, count)])


@pytest.mark.parametrize("coder", [DEFLATE, ANS])
def test_heads_that_are_not_possible_are_refused(coder):
    block, expected = coded_block(coder)
    coded = block[0]
    for place, value in ((0, 3), (0, 0), (0, 255), (0, coded ^ 3), (0, coded ^ 4), (0, coded ^ 8), (0, coded + 16), (1, 200), (4, 5)):
        damaged = bytearray(block)
        damaged[place] = value
        with pytest.raises(PackedFileError, match="damaged head|does not hold|ends early|it has|coded|fit"):
            streams_of(damaged, expected)


def test_a_coded_sequence_without_sense_is_refused():
    symbols = values_of(3, 5000, 0, peaked=True)
    coded = ans.encode(symbols)
    words_at = 3 + 2 * coded[0]
    for damaged, count in (
        (b"", 5000),
        (coded[:5], 5000),
        (coded[:-1], 5000),
        (bytes([0]) + coded[1:], 5000),
        (coded[:1] + bytes(words_at - 1) + coded[words_at:], 5000),
        (coded + bytes(4), 5000),
        (coded, 4000),
        (coded[:words_at] + coded[words_at + 4 :], 4000),
    ):
        with pytest.raises(PackedFileError, match="coded sequence"):
            ans.decode(memoryview(damaged), count)


def test_values_above_their_width_are_refused():
    block = encode_block([Stream(3, values_of(3, 800000, 0, peaked=True))], Effort(True))
    assert block[0] == DEFLATE | 2 << 2  # in a plane of 4 bits, none of them low
    assert len(streams_of(block, [(4, 800000)])) == 1
    with pytest.raises(PackedFileError, match="a value does not fit 2 bits"):
        streams_of(block, [(2, 800000)])


def test_rows_that_spread_alike_share_a_model():
    generator = np.random.default_rng(0)
    spread = np.repeat([1.0, 30.0], 50)[:, None]
    codes = np.abs(np.rint(generator.standard_normal((100, 2000)) * spread)).astype(np.uint8)
    widths = np.full((100, 1), 8, np.uint8)
    bins = bins_of(codes, widths)
    histogram = Histogram()
    histogram.add(codes, widths, bins)
    assert histogram.classes(by_bin=False) == [CodeClass(8, 0, BINS - 1)]
    classes = histogram.classes(by_bin=True)
    assert len(classes) == 2
    assert (class_table(classes)[widths[:, 0], bins] == np.repeat([1, 0], 50)).all()  # narrow rows have the higher bins


def test_classes_that_overlap_or_are_missing_are_refused():
    with pytest.raises(PackedFileError, match="two models of 3 bits claim one bin"):
        class_table([CodeClass(3, 0, 5), CodeClass(3, 5, 6)])
    widths, bins = np.array([[3, 3], [3, 2]], np.uint8), np.array([2, 5], np.uint8)
    table = class_table([CodeClass(2, 0, 5), CodeClass(3, 0, 5)])
    assert Grouping(2, 7, 4, widths, bins, table).counts(2).tolist() == [3, 11]
    widths[0, 1] = 4
    with pytest.raises(PackedFileError, match="has no model"):
        Grouping(2, 7, 4, widths, bins, table).counts(2)
