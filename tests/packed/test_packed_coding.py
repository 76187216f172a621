"""Bit planes, the entropy coder and blocks of streams: every width and every length comes back, and at its entropy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed import rans
from diffq_fx.export.packed.bitplanes import pack, packed_size, unpack
from diffq_fx.export.packed.classes import BINS, ClassTable, CodeClass, Histogram, bins_of
from diffq_fx.export.packed.streams import Stream, decode_block, encode_block

WIDTHS = st.integers(1, 16)


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
    assert np.array_equal(unpack(packed, width, count), values)


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 300), max_size=5), steps=st.integers(1, 64), seed=st.integers(0, 999))
def test_the_coder_gives_back_symbols_and_what_it_hides(counts, steps, seed):
    streams = [values_of(6, count, seed + index, peaked=index % 2 == 0) for index, count in enumerate(counts)]
    frequencies = [rans.frequencies_of(np.bincount(s, minlength=64) if len(s) else np.ones(64, np.int64)) for s in streams]
    lanes = rans.Lanes.of(counts, steps)
    hidden = np.random.default_rng(seed).integers(0, 2**16, lanes.total, dtype=np.uint16)
    states, words = rans.encode(streams, frequencies, lanes, hidden)
    found, found_hidden = rans.decode(states, words, frequencies, lanes)
    assert all(np.array_equal(a, b) for a, b in zip(found, streams, strict=True))
    assert np.array_equal(found_hidden, hidden)


def test_the_code_is_as_long_as_the_entropy():
    symbols = np.minimum(np.random.default_rng(0).geometric(0.3, 1_000_000) - 1, 63).astype(np.uint8)
    counts = np.bincount(symbols, minlength=64)
    share = counts[counts > 0] / len(symbols)
    entropy = -(share @ np.log2(share)) * len(symbols) / 8
    lanes = rans.Lanes.of([len(symbols)], 2048)
    states, words = rans.encode([symbols], [rans.frequencies_of(counts)], lanes, np.zeros(0, np.uint16))
    assert words.nbytes + states.nbytes < 1.006 * entropy
    assert words.nbytes > 0.99 * entropy


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=64, max_size=64).filter(any))
def test_frequencies_sum_up_and_forget_no_symbol(counts):
    counts = np.array(counts)
    frequencies = rans.frequencies_of(counts)
    assert frequencies.sum() == 4096
    assert (frequencies[counts > 0] > 0).all()
    assert frequencies.max() < 4096


@settings(deadline=None, max_examples=200)
@given(
    streams=st.lists(st.tuples(WIDTHS, st.sampled_from([0, 1, 2, 7, 64, 1000, 5000]), st.booleans()), max_size=6),
    entropy=st.booleans(),
    hidden=st.integers(0, 30),
    seed=st.integers(0, 999),
)
def test_blocks_give_back_streams_and_what_they_hide(streams, entropy, hidden, seed):
    given = [Stream(width, values_of(width, count, seed + i, peaked)) for i, (width, count, peaked) in enumerate(streams)]
    secret = np.random.default_rng(seed).bytes(2 * hidden)
    block, taken = encode_block(given, entropy=entropy, hidden=secret)
    found, found_secret = decode_block(memoryview(block), [(stream.width, stream.count) for stream in given])
    for fold in (False, True):
        for stream, decoded in zip(given, found, strict=True):
            if fold:
                decoded.fold()
            assert np.array_equal(decoded.values(), stream.values)
    assert found_secret[:taken] == secret[:taken]
    assert not any(found_secret[taken:])


def coded_block():
    return encode_block([Stream(4, values_of(4, 20000, 0, peaked=True))], entropy=True)[0], [(4, 20000)]


def test_blocks_of_another_size_are_refused():
    block, expected = coded_block()
    for cut in (0, 5, 6, 7, 40, 200, len(block) - 1):
        with pytest.raises(PackedFileError, match=r"ends early|damaged head"):
            decode_block(memoryview(block[:cut]), expected)
    with pytest.raises(PackedFileError, match="has 1 too many"):
        decode_block(memoryview(block + b"x"), expected)
    with pytest.raises(PackedFileError):
        decode_block(memoryview(block), [(4, 19999 - 4096)])


def test_a_flipped_word_is_seen():
    block, expected = coded_block()
    for place in (31, 35, 100, len(block) // 2, len(block) - 1):  # a frequency, a state, words
        damaged = bytearray(block)
        damaged[place] ^= 0x55
        with pytest.raises(PackedFileError, match=r"frequencies|state|words|end early"):
            decode_block(memoryview(damaged), expected)


def test_rows_that_spread_alike_share_a_model():
    generator = np.random.default_rng(0)
    spread = np.repeat([1.0, 30.0], 50)[:, None]
    codes = (np.rint(generator.standard_normal((100, 2000)) * spread).astype(int) % 256).astype(np.uint8)
    widths = np.full((100, 1), 8, np.uint8)
    bins = bins_of(codes, widths)
    histogram = Histogram()
    histogram.add(codes, widths, bins)
    assert histogram.classes(by_bin=False) == [CodeClass(8, 0, BINS - 1)]
    classes = histogram.classes(by_bin=True)
    assert len(classes) == 2
    table = ClassTable(classes)
    assert (table.of(widths, bins)[:, 0] == np.repeat([1, 0], 50)).all()  # narrow rows have the higher bins


def test_classes_that_overlap_or_are_missing_are_refused():
    with pytest.raises(PackedFileError, match="two models of 3 bits claim one bin"):
        ClassTable([CodeClass(3, 0, 5), CodeClass(3, 5, 6)])
    with pytest.raises(PackedFileError, match="has no model"):
        ClassTable([CodeClass(3, 0, 5)]).of(np.array([[4]], np.uint8), np.array([0], np.uint8))
