"""Bit planes, the entropy coder and blocks of streams: every width and every length comes back, and at its entropy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed import ans, deflate
from diffq_fx.export.packed.bitplanes import pack, packed_size, planes, unpack
from diffq_fx.export.packed.classes import BINS, CodeClass, Histogram, bins_in, bins_of, class_table, merged_bins
from diffq_fx.export.packed.container import Source
from diffq_fx.export.packed.streams import ANS, DEFLATE, STORED, Effort, Stream, decode_block, encode_block
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


def test_a_plane_is_read_in_pieces_of_any_length(monkeypatch):
    symbols = values_of(5, 2000, 0, peaked=True)
    coded = memoryview(deflate.encode(symbols))
    for at_once in (7, len(coded) // 2, len(coded) - 1, len(coded), len(coded) + 1):
        monkeypatch.setattr(deflate, "_AT_ONCE", at_once)
        assert np.array_equal(deflate.decode(coded, 2000), symbols)
    with pytest.raises(PackedFileError, match="a coded plane is damaged"):
        deflate.decode(memoryview(b"\xff" * 20), 2000)


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


def folded_laplace(width, count, scale):
    drawn = np.rint(np.random.default_rng(0).laplace(size=count) * scale)
    return np.minimum(np.where(drawn < 0, -2 * drawn - 1, 2 * drawn), 2**width - 1).astype(np.uint8 if width <= 8 else np.uint16)


@pytest.mark.parametrize(
    ("width", "count", "scale", "quick", "patient"),
    [  # coder, bits of the plane, low bits
        (2, 60_000, 0.4, (DEFLATE, 2, 0), (ANS, 8, 0)),
        (4, 60_000, 0.9, (DEFLATE, 4, 0), (ANS, 8, 0)),
        (4, 60_000, 0.2, (ANS, 4, 0), (ANS, 8, 0)),
        (5, 60_000, 1.0, (ANS, 8, 0), (ANS, 8, 0)),
        (5, 60_000, 4.0, (DEFLATE, 4, 1), (ANS, 8, 0)),
        (8, 60_000, 30.0, (DEFLATE, 4, 4), (DEFLATE, 8, 0)),
        (8, 60_000, 2.0, (DEFLATE, 8, 0), (ANS, 8, 0)),
        (12, 60_000, 500.0, (DEFLATE, 4, 8), (DEFLATE, 8, 4)),
        (4, 400, 0.9, (ANS, 8, 2), (ANS, 8, 2)),
        (8, 400, 3.0, (DEFLATE, 8, 2), (DEFLATE, 8, 2)),
        (10, 2000, 3.0, (DEFLATE, 8, 2), (DEFLATE, 8, 2)),
        (4, 60_000, 1e3, (ANS, 4, 0), (ANS, 8, 0)),
        (3, 30, 0.5, (STORED, 1, 0), (STORED, 1, 0)),
    ],
)
def test_how_a_stream_is_coded(width, count, scale, quick, patient):
    stream = Stream(width, folded_laplace(width, count, scale))
    for effort, expected in ((Effort(True), quick), (Effort(True, True), patient), (Effort(False), (STORED, 1, 0))):
        head = encode_block([stream], effort)[0]
        assert (head & 3, 1 << (head >> 2 & 3), head >> 4) == expected


@pytest.mark.parametrize("coder", [ans, deflate])
@pytest.mark.parametrize("used", [[0, 1, 2], [0, 7, 30]])
def test_the_expected_length_has_the_table(coder, used):
    symbols = np.random.default_rng(0).choice(np.array(used, np.uint8), 400, p=[0.6, 0.3, 0.1])
    shares = np.bincount(symbols, minlength=64) / len(symbols)
    assert coder.estimated_bits(shares, 400) == pytest.approx(8 * len(coder.encode(symbols)), abs=80)


@pytest.mark.parametrize(("shares", "mean"), [([1.0], 1), ([0.5, 0.5], 1), ([0.5, 0.0, 0.25, 0.25], 1.5), ([0.4, 0.3, 0.2, 0.1], 1.9)])
@pytest.mark.parametrize(("size", "blocks"), [(1000, 1), (2**15, 1), (2**15 + 1, 2)])
def test_the_expected_length_of_huffman_codes(shares, mean, size, blocks):
    table = 100 + 3 * np.count_nonzero(shares)
    assert deflate.estimated_bits(np.array(shares), size) == pytest.approx(size * mean + blocks * table)


@pytest.mark.parametrize(("width", "scale"), [(2, 0.4), (3, 0.5), (4, 0.9), (4, 2.0), (5, 1.0), (5, 4.0), (8, 2.0), (8, 30.0), (12, 500.0)])
def test_a_stream_is_as_long_as_its_entropy(width, scale):
    values = folded_laplace(width, 2_000_000, scale)
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


def test_a_head_without_high_bits_is_damaged():
    block, expected = coded_block(DEFLATE)
    damaged = bytes([DEFLATE | 2 << 2 | 4 << 4]) + block[1:]
    with pytest.raises(PackedFileError, match="a stream of 4 bits has a damaged head: coder 1, 4 low bits, plane of 4"):
        streams_of(damaged, expected)


def test_symbols_that_hardly_occur_take_no_more_than_they_tell():
    symbols = np.zeros(300_000, np.uint8)
    symbols[1000:1255] = np.arange(1, 256)
    coded = ans.encode(symbols)
    assert len(coded) < ans.estimated_bits(np.bincount(symbols) / len(symbols), len(symbols)) / 8
    assert np.array_equal(ans.decode(memoryview(coded), len(symbols)), symbols)


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


def test_the_bin_of_a_row_is_its_mean_code_in_sixteenths_of_an_octave():
    codes = np.array([[255] * 128, [128] * 128, [64] * 128, [32] * 128, [0] * 128], np.uint8)
    widths = np.full((5, 1), 8, np.uint8)
    assert bins_of(codes, widths).tolist() == [0, 16, 32, 48, 127]
    assert bins_of(codes[:, :127], widths).tolist() == [int(-16 * np.log2(codes.mean() / 512)) - 16], "short rows share one"
    assert (bins_in(5, 128), bins_in(5, 127)) == (5, 1)
    assert bins_of(codes // 32, widths - 5).tolist() == bins_of(codes // 32 * 32, widths).tolist(), "in shares of the range"
    assert bins_of(np.full((1, 128), 90, np.uint8), widths[:1]).tolist() == [int(16 * np.log2(512 / 90)) - 16]


def bits_of(counts):
    """Of the order-0 code of symbols that occur so often, and 1000 for their table."""
    counts = counts[counts > 0].astype(float)
    return 1000 - float((counts * np.log2(counts / counts.sum())).sum())


@pytest.mark.parametrize("seed", range(4))
def test_bins_are_cut_into_the_classes_of_the_shortest_code(seed):
    generator = np.random.default_rng(seed)
    used = np.sort(generator.choice(BINS, 6, replace=False)).astype(np.uint8)
    spread = np.sort(generator.choice([1, 2, 4, 9, 20, 40], 6))[::-1, None]
    codes = np.minimum(np.abs(np.rint(generator.standard_normal((6, 900)) * spread)), 63).astype(np.uint8)
    histogram, widths = Histogram(), np.full((6, 1), 6, np.uint8)
    histogram.add(codes, widths, used)
    counts = np.stack([np.bincount(row, minlength=64) for row in codes])
    shortest, best = np.inf, None
    for cuts in (cuts for number in range(6) for cuts in itertools.combinations(range(1, 6), number)):
        runs = list(itertools.pairwise([0, *cuts, 6]))
        if (found := sum(bits_of(counts[first:stop].sum(0)) for first, stop in runs)) < shortest:
            shortest, best = found, runs
    ends = [0, *(int(used[first]) for first, _ in best[1:]), BINS]
    assert histogram.classes(by_bin=True) == [CodeClass(6, first, stop - 1) for first, stop in itertools.pairwise(ends)]


def test_the_codes_of_wide_values_are_counted_by_their_six_high_bits():
    codes, widths = np.array([[3, 200, 255], [1, 2, 3]], np.uint8), np.array([[8], [2]], np.uint8)
    histogram = Histogram()
    histogram.add(codes, widths, np.array([5, 127], np.uint8))
    assert histogram.classes(by_bin=False) == [CodeClass(2, 0, BINS - 1), CodeClass(8, 0, BINS - 1)]
    assert [(each.width, each.first_bin, each.last_bin) for each in histogram.classes(by_bin=True)] == [(2, 0, 127), (8, 0, 127)]
    counts = histogram._counts
    assert {tuple(place): int(counts[tuple(place)]) for place in np.argwhere(counts)} == {
        (8, 5, 0): 1,
        (8, 5, 50): 1,
        (8, 5, 63): 1,
        (2, 127, 1): 1,
        (2, 127, 2): 1,
        (2, 127, 3): 1,
    }


def test_rows_tell_no_more_bins_than_some_width_tells_apart():
    classes = [CodeClass(3, 0, 20), CodeClass(3, 21, 127), CodeClass(5, 0, 63), CodeClass(5, 64, 127)]
    table, merged = class_table(classes), merged_bins(classes)
    assert merged.tolist() == [0] * 21 + [21] * 43 + [64] * 64
    assert (table[:, merged] == table).all()


def test_classes_that_overlap_or_are_missing_are_refused():
    with pytest.raises(PackedFileError, match="two models of 3 bits claim one bin"):
        class_table([CodeClass(3, 0, 5), CodeClass(3, 5, 6)])
    widths, bins = np.array([[3, 3], [3, 2]], np.uint8), np.array([2, 5], np.uint8)
    table = class_table([CodeClass(2, 0, 5), CodeClass(3, 0, 5)])
    assert Grouping(2, 7, 4, widths, bins, table).counts(2).tolist() == [3, 11]
    widths[0, 1] = 4
    with pytest.raises(PackedFileError, match="has no model"):
        Grouping(2, 7, 4, widths, bins, table).counts(2)
