"""A second reader of packed files, written from docs/packed-format.md alone; it imports numpy and Python's own modules, nothing of the package.

It reads for clearness, checks every checksum, and gives every tensor as its type's name, shape and bytes.
"""

import json
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}  # all others 1
NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
}
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple
    data: bytes


def read(path):
    """Every tensor and quantized weight of a file, by each of its names."""
    file = path.read_bytes()
    body = 8 + struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8:body])
    assert header.pop("__metadata__") == {"format": "diffq_fx.packed", "version": "1"}
    entries = {name: Tensor(each["dtype"], tuple(each["shape"]), cut(file[body:], *each["data_offsets"])) for name, each in header.items()}
    packed = entries["diffq_fx/contents"].data
    assert entries["diffq_fx/header_crc32"].data == struct.pack("<I", zlib.crc32(packed, zlib.crc32(file[:body])))
    contents = json.loads(zlib.decompress(packed, -15))
    found = plain_tensors(entries, contents) | small_tensors(entries, contents)
    weights = [Weight(contents["defaults"].get(each["kind"], {}) | each, place, entries) for place, each in enumerate(contents["weights"])]
    for place, shard in enumerate(contents["shards"]):
        read_shard(entries[f"diffq_fx/shard/{place}"].data, shard, weights)
    for weight in weights:
        found |= dict.fromkeys(weight.names, weight.tensor())
    return found


def cut(data, start, stop):
    return data[start:stop]


def plain_tensors(entries, contents):
    found, crc = {}, 0
    for name, stored in entries.items():
        if not name.startswith("diffq_fx/"):
            crc = zlib.crc32(stored.data, crc)
            found |= named(name, contents["tensors"].get(name, {}), stored)
    assert crc == contents["tensors_crc32"]
    return found


def small_tensors(entries, contents):
    every = contents["small"]
    sizes = {name: ITEM_BYTES.get(each.get("stored", "F32"), 1) * math.prod(each["shape"]) for name, each in every.items()}
    data = b""
    if contents["small_section"]:
        size, crc = contents["small_section"]
        section = entries["diffq_fx/small"].data
        assert zlib.crc32(section) == crc
        assert len(section) >= sum(sizes.values()) / 128
        assert not any(section[size:])
        data = coded_bytes(section[:size], sum(sizes.values()))
    found, at = {}, 0
    for name, each in every.items():
        found |= named(name, each, Tensor(each.get("stored", "F32"), tuple(each["shape"]), data[at : at + sizes[name]]))
        at += sizes[name]
    return found


def named(name, facts, stored):
    """A plain tensor in the type that it has in the model, by all its names."""
    dtype = facts.get("dtype", "F32" if stored.dtype == "F16" else stored.dtype)
    data = stored.data if dtype == stored.dtype else np.frombuffer(stored.data, NUMPY[stored.dtype]).astype(NUMPY[dtype]).tobytes()
    return dict.fromkeys([name, *facts.get("aliases", [])], Tensor(dtype, stored.shape, data))


# Blocks of streams


def planes_of(width):
    """Bits of each plane of a width, from the low bits up."""
    while width:
        yield (bits := next(p for p in (8, 4, 2, 1) if p <= width))
        width -= bits


def unpack(data, width, count):
    """Bit-packed values, and the bytes that they take."""
    values, at, shift = np.zeros(count, np.int64), 0, 0
    for bits in planes_of(width):
        size = -(-count * bits // 8)
        plane = np.frombuffer(data[at : at + size], np.uint8).astype(np.int64)
        spread = np.concatenate([plane >> (bits * place) & ((1 << bits) - 1) for place in range(8 // bits)])
        values |= spread[:count] << shift
        at, shift = at + size, shift + bits
    return values, at


def streams(data, wanted):
    """The values of each stream of a block, of (width, count) each; nothing may be left."""
    found, at = [], 0
    for width, count in wanted:
        if not count:
            found.append(np.zeros(0, np.int64))
            continue
        head, at = data[at], at + 1
        coder, plane_bits, low = head & 3, 1 << (head >> 2 & 3), head >> 4
        high = np.zeros(count, np.int64)
        if coder == 0:
            assert head == 0
            low = width
        else:
            size = struct.unpack("<I", data[at : at + 4])[0]
            coded, at = data[at + 4 : at + 4 + size], at + 4 + size
            plane_bytes = -(-count * plane_bits // 8)
            plane = zlib.decompress(coded, -15) if coder == 1 else ans(coded, plane_bytes)
            assert len(plane) == plane_bytes
            high = unpack(plane, plane_bits, count)[0]
        values, size = unpack(data[at:], low, count)
        found.append(high << low | values)
        at += size
    assert at == len(data)
    return found


def coded_bytes(data, count):
    found = np.zeros(count, np.uint8)
    for place, values in enumerate(streams(data, [(8, len(found[place::4])) for place in range(4)])):
        found[place::4] = values
    return found.tobytes()


def ans(data, count):
    """Bytes from a stack of asymmetric numeral systems: a state of 64 bits, words of 32, probabilities of 24."""
    frequencies = np.frombuffer(data[1 : 3 + 2 * data[0]], "<u2").astype(np.float32)
    words = list(struct.unpack(f"<{(len(data) - 3 - 2 * data[0]) // 4}I", data[3 + 2 * data[0] :]))
    before = np.concatenate([[np.float32(0)], np.cumsum(frequencies, dtype=np.float32)])
    scale = np.float32((1 << 24) - len(frequencies)) / before[-1]
    firsts = (before * scale).astype(np.int64) + np.arange(len(before))
    firsts[-1] = 1 << 24
    state = words.pop()
    while state < 1 << 32 and words:
        state = state << 32 | words.pop()

    def take(first, share):
        nonlocal state
        state = (state >> 24) * share + (state & 0xFFFFFF) - first
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()

    found = bytearray()
    for _ in range(count):
        symbol = int(np.searchsorted(firsts, state & 0xFFFFFF, side="right")) - 1
        take(int(firsts[symbol]), int(firsts[symbol + 1] - firsts[symbol]))
        found.append(symbol)
    assert (state & 0xFFFFFF) >> 8 == 0xD1FF
    take(0xD1FF << 8, 1 << 8)
    assert state == 0
    assert not words
    return bytes(found)


# Shards


class Part(NamedTuple):
    weight: "Weight"
    rows: int


def read_shard(data, facts, weights):
    """Decode all rows of a shard into their weights."""
    assert zlib.crc32(data) == facts["crc32"]
    parts = [
        Part(weights[index], min(step, stop - row))
        for index, first, count in facts["spans"]
        for stop in [first + count]
        for step in [max(1048576 // weights[index].columns, 1)]
        for row in range(first, stop, step)
    ]
    assert len(data) >= sum(part.rows * part.weight.columns for part in parts) / 128
    ends = np.cumsum(facts["sections"])
    sections = [data[end - size : end] for size, end in zip(facts["sections"], ends, strict=True)]
    assert not any(data[ends[-1] :])

    groups = [part.weight.groups(part.rows) for part in parts]
    (told,) = streams(sections[0], [(4, sum(rows * columns for rows, columns in groups))])
    widths = [each.reshape(shape) + 1 for each, shape in zip(split(told, [r * c for r, c in groups]), groups, strict=True)]

    bin_counts = [part.rows if part.weight.codes_in_row >= 128 else 1 for part in parts]
    bins = streams(sections[1], [(7, sum(bin_counts))])[0] if sections[1] else np.zeros(sum(bin_counts), np.int64)

    integer_widths = [part.weight.integer_widths(each, part.rows) for part, each in zip(parts, widths, strict=True)]
    every = np.concatenate([np.zeros(0, np.int64), *integer_widths])
    integers, present = np.zeros(len(every), np.int64), np.unique(every)
    for width, values in zip(present, streams(sections[2], [(int(w), int((every == w).sum())) for w in present]), strict=True):
        integers[every == width] = values

    float_bytes = [part.weight.float_bytes(part.rows) for part in parts]
    floats = coded_bytes(sections[3], sum(float_bytes))

    tiles = []  # of all parts: where the codes go, and the class of each
    codes = [np.zeros((part.rows, part.weight.codes_in_row), np.int64) for part in parts]
    for part, each, own_bins, own_codes in zip(parts, widths, split(bins, bin_counts), codes, strict=True):
        row_bins = np.broadcast_to(own_bins, part.rows) if len(own_bins) == 1 else own_bins
        block = part.weight.block
        full = part.weight.codes_in_row // block
        for first, last in ((0, full), (full, -(-part.weight.codes_in_row // block))):
            tiles += [
                (own_codes[row, block * column : block * (column + 1)], class_of(facts["classes"], int(spread[row, column]), row_bins[row]))
                for spread in [np.broadcast_to(each, (part.rows, each.shape[1]))]
                for row in range(part.rows)
                for column in range(first, last)
            ]
    sizes = [sum(len(place) for place, which in tiles if which == index) for index in range(len(facts["classes"]))]
    coded = streams(sections[4], [(width, size) for (width, _, _), size in zip(facts["classes"], sizes, strict=True)])
    at = [0] * len(coded)
    for place, which in tiles:
        place[:] = coded[which][at[which] : at[which] + len(place)]
        at[which] += len(place)

    numbers = split(integers, [len(each) for each in integer_widths])
    for part, each, own, number, start, size in zip(parts, widths, codes, numbers, np.cumsum([0, *float_bytes]), float_bytes, strict=False):
        part.weight.add(own, each, number, floats[start : start + size])


def split(values, counts):
    return np.split(values, np.cumsum(counts)[:-1]) if counts else []


def class_of(classes, width, row_bin):
    (found,) = [place for place, (w, first, last) in enumerate(classes) if w == width and first <= row_bin <= last]
    return found


# Weights


class Weight:
    """A quantized weight, which gets the rows of its parts one after the other."""

    def __init__(self, facts, place, entries):
        self.facts, self.names = facts, [facts["name"], *facts.get("aliases", [])]
        self.shape, self.axis, self.kind = facts["shape"], facts["axis"], facts["kind"]
        self.rows = self.shape[self.axis]
        self.columns = math.prod(self.shape) // self.rows
        self.codes_in_row = self.columns if self.kind == "integer" else -(-self.columns // facts["block_size"])
        self.group_size = facts["group_size"] if self.kind == "integer" else "tensor"
        self.block = self.block_of(self.group_size)
        if self.kind == "codebook":
            self.codebook = entries[f"diffq_fx/common/{place}"]
            assert zlib.crc32(self.codebook.data) == facts["common_crc32"]
        self.done = []

    def block_of(self, size):
        return self.codes_in_row if size in ("tensor", "channel") else min(size, self.codes_in_row)

    def groups_of(self, size, rows):
        """Rows and columns of groups in a part."""
        return (1 if size == "tensor" else rows), -(-self.codes_in_row // self.block_of(size))

    def groups(self, rows):
        return self.groups_of(self.group_size, rows)

    def spread(self, values, rows):
        """Values of groups, of any size, to one value for each code."""
        block = next(
            self.block_of(size) for size in (self.group_size, self.facts["range_size"]) if self.groups_of(size, rows) == values.shape
        )
        return np.broadcast_to(np.repeat(values, block, axis=1)[:, : self.codes_in_row], (rows, self.codes_in_row))

    def scale_groups(self, rows):
        """The finer of the groups of widths and of ranges."""
        return max((self.groups_of(size, rows) for size in (self.group_size, self.facts["range_size"])), key=lambda each: each[0] * each[1])

    def pairs(self, widths, rows):
        """Range and width of each code, as one number that rises by range and then by width."""
        ranges = np.arange(math.prod(shape := self.groups_of(self.facts["range_size"], rows))).reshape(shape)
        return self.spread(ranges, rows) * 32 + self.spread(widths, rows)

    def integer_widths(self, widths, rows):
        more = {"coded": 0, "halves": 1}.get(self.facts.get("zero_point"))
        if self.kind == "codebook" or more is None:
            return np.zeros(0, np.int64)
        if self.facts["scale"] == "extents":
            return np.unique(self.pairs(widths, rows)) % 32 + more
        return np.broadcast_to(widths, self.scale_groups(rows)).reshape(-1) + more

    def float_bytes(self, rows):
        if self.kind == "codebook":
            return 0
        count = math.prod(self.groups_of(self.facts["range_size"], rows) if self.facts["scale"] == "extents" else self.scale_groups(rows))
        item = ITEM_BYTES[FLOATS[self.facts["scale_dtype"]]]
        return count * (item * (2 if self.facts["grid"] == "float" else 1) + (4 if self.facts["zero_point"] == "plain" else 0))

    def add(self, codes, widths, integers, floats):
        self.done.append(self.from_codebook(codes) if self.kind == "codebook" else self.from_levels(codes, widths, integers, floats))

    def from_codebook(self, codes):
        entries = to_float64(self.codebook)
        entries = entries if self.codebook.dtype == "F64" else entries.astype(np.float32)
        values = entries[codes].reshape(len(codes), -1)[:, : self.columns]
        return values * np.float32(self.facts["scale"]) if self.facts.get("scale") is not None else values

    def from_levels(self, codes, widths, integers, floats):
        rows, scale_dtype, zero_point = len(codes), FLOATS[self.facts["scale_dtype"]], self.facts["zero_point"]
        item = ITEM_BYTES[scale_dtype]
        shape = self.groups_of(self.facts["range_size"], rows) if self.facts["scale"] == "extents" else self.scale_groups(rows)
        count = math.prod(shape)
        b = self.spread(widths, rows)
        scale = self.spread(to_float64(Tensor(scale_dtype, shape, floats[: count * item])), rows)
        if self.facts["scale"] == "extents":
            scale = rounded(scale / (2.0**b - 1), scale_dtype)
            smallest = {"F64": 2.0**-1022, "F16": 2.0**-14}.get(scale_dtype, 2.0**-126)
            scale = np.where(scale > smallest, scale, 1.0)
        if self.facts["grid"] == "float":
            offset = self.spread(to_float64(Tensor(scale_dtype, shape, floats[count * item :])), rows)
            centre = np.round(-offset / scale)
        elif zero_point in ("coded", "halves"):
            if self.facts["scale"] == "extents":
                found = integers[np.unique(self.pairs(widths, rows), return_inverse=True)[1].reshape(rows, -1)]
            else:
                found = self.spread(integers.reshape(self.scale_groups(rows)), rows)
            zero = found / (2.0 if zero_point == "halves" else 1.0)
        elif zero_point == "plain":
            dtype = "F32" if self.facts["grid"] == "half" else "I32"
            zero = self.spread(np.frombuffer(floats[-4 * count :], NUMPY[dtype]).astype(np.float64).reshape(shape), rows)
        else:
            zero = {"middle": 2.0 ** (b - 1), "centre": (2.0**b - 1) / 2}[zero_point]
        if self.facts["grid"] != "float":
            centre = np.ceil(zero)
        centre = np.clip(centre, 0, 2.0**b - 1)
        computed = "F32" if item == 2 else scale_dtype
        distance = np.where(codes % 2 == 0, codes // 2, -(codes + 1) // 2)
        level = (centre + distance) % 2.0**b
        if self.facts["grid"] == "float":
            return rounded(rounded(level * scale, computed) + offset, computed)
        return rounded(rounded(level - zero, computed) * scale, computed)

    def tensor(self):
        rows_first = [self.rows, *(side for place, side in enumerate(self.shape) if place != self.axis)]
        values = np.moveaxis(np.concatenate(self.done).reshape(rows_first), 0, self.axis)
        dtype = FLOATS[self.facts["dtype"]]
        return Tensor(dtype, tuple(self.shape), to_bytes(values, dtype))


# Floating point, of which numpy lacks bfloat16


def to_float64(tensor):
    if tensor.dtype == "BF16":
        values = (np.frombuffer(tensor.data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(tensor.data, NUMPY[tensor.dtype])
    return values.astype(np.float64).reshape(tensor.shape)


def to_bytes(values, dtype):
    """Values rounded to nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(NUMPY[dtype]).tobytes()
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def rounded(values, dtype):
    return to_float64(Tensor(dtype, values.shape, to_bytes(values, dtype)))
