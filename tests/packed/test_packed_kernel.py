"""What the C kernel makes of a file is bit by bit what numpy makes of it; deflate streams are read alike with isal and without."""

import sys

import numpy as np
import pytest
import torch
from packed_models import assert_equal, converted, expected, float_twin, store, store_codes

from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed import deflate, unpacking
from diffq_fx.export.packed.bitplanes import pack, planes
from diffq_fx.export.packed.streams import DecodedStream
from diffq_fx.export.packed.unpacking import Grid, Grouping, Streams, count_cells
from diffq_fx.kernels import extension

KERNELS = ("native", "torch")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Both ways, chosen as a user chooses."""
    if request.param == "native" and extension.kernels() is None:
        pytest.skip("the kernels are not built")
    monkeypatch.setenv("DIFFQ_FX_KERNELS", request.param)
    monkeypatch.setattr(extension, "kernels", extension.kernels.__wrapped__)
    assert (extension.kernels() is None) == (request.param == "torch")
    return request.param


def model_of_all_layouts():
    """Every grid, groups with a short last block, ranges finer and coarser than the groups of bits, widths below and above 8."""
    return converted(
        store("affine", (30, 211), bits=(1, 16), group=8, ranges="channel"),
        store("paper", (30, 211), bits=(2, 15), group=8, ranges="tensor", grid="float"),
        store("coarse", (30, 64), bits=(1, 16), group=4, ranges="tensor"),
        store("fine", (30, 211), bits=(2, 6), group="channel", ranges=16),
        store("fine_float", (30, 211), bits=(2, 6), group="tensor", ranges=7, grid="float"),
        store("channels", (9, 1300), bits=(3, 9), grid="symmetric"),
        store("tensor", (9, 1300), bits=5, group="tensor"),
        store("centred", (9, 1300), bits=(1, 5), grid="half"),
        store("half_blocks", (30, 211), bits=(1, 4), group=8, ranges="channel", grid="half"),
        store("half_fine", (30, 211), bits=(1, 4), group="channel", ranges=16, grid="half"),
        store("half_tensor", (30, 211), bits=(1, 4), group=4, ranges="tensor", grid="half"),
        store("moved", (7, 50, 3), axis=1, bits=(2, 5), group=16, grid="float", dtype=torch.float16),
        store("wide", (20, 40), bits=(2, 12), group=8, dtype=torch.float64),
        store_codes("codes", (60, 300), entries=300, block=2),
    )


@pytest.mark.parametrize("compression", ["entropy", "bits"])
def test_both_ways_give_the_converted_weights(tmp_path, kernel, compression, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.packed.shards._PART_WEIGHTS", 3000)
    model = model_of_all_layouts()
    path = save_packed(model, tmp_path / "m.safetensors", compression)
    assert_equal(load_packed(path), expected(model))
    assert_equal(load_packed(float_twin(model), path).state_dict(), expected(model))
    other = converted(*(store(m.spec.name, m.spec.shape, axis=m.spec.axis, dtype=m.spec.dtype) for m in stored(model)))
    assert_equal(load_packed(other, path).state_dict(), model.state_dict())


def stored(model):
    return {id(m): m for m in model.modules() if hasattr(m, "spec")}.values()


def test_zero_points_and_offsets_of_any_size(tmp_path, kernel):
    """Wrapping integers and infinite scales: both ways do what the converted model does."""
    plain = store("plain", (6, 24), bits=(2, 8), group=8, ranges="channel")
    plain.zero_point[0, 0], plain.zero_point[1, 1] = -(2**31), 2**31 - 1
    plain.scale[2, 0], plain.scale[3, 1] = float("inf"), -1.5
    offset = store("offset", (6, 24), bits=(2, 8), group=8, grid="float")
    offset.offset[0, 0], offset.offset[1, 1], offset.offset[2, 2] = float("nan"), -0.0, 3e38
    model = converted(plain, offset)
    assert_equal(load_packed(save_packed(model, tmp_path / "m.safetensors")), expected(model))


def test_a_product_is_rounded_before_the_offset_is_added():
    """A fused multiply-add would give another weight."""
    if extension.kernels() is None:
        pytest.skip("the kernels are not built")
    scale, offset = np.float32(1 + 2**-23), np.float32(-3.0)
    assert np.float32(np.float64(scale) * 3 + np.float64(offset)) != scale * np.float32(3) + offset
    codes = np.full(11, 6, np.uint8)
    streams = Streams([DecodedStream(4, 11, planes(pack(codes, 4), 4, 11))])
    grouping = Grouping(1, 11, 11, np.full((1, 1), 4, np.uint8), np.zeros(1, np.uint8), np.zeros((17, 1), np.uint16))
    out = np.empty((1, 11), np.float32)
    grid = Grid(np.full((1, 1), scale), np.zeros((1, 1), np.int32), None, np.full((1, 1), offset))
    unpacking.fill_in_order(streams, np.zeros(1, np.int64), grouping, grid, out)
    assert (out == scale * np.float32(3) + offset).all()


@pytest.mark.parametrize("block", [1, 3, 4, 8, 16, 700])
def test_codes_of_many_classes_come_in_the_order_of_the_weight(kernel, block):
    """Groups of every width, streams whose planes end in the middle of a byte, groups longer than what is unpacked at a time."""
    rows, groups = 7, 5
    generator = np.random.default_rng(block)
    widths, bins = generator.integers(1, 17, (rows, groups), np.uint8), generator.integers(0, 2, rows, np.uint8)
    classes = np.arange(34, dtype=np.uint16).reshape(17, 2)
    wanted = (generator.integers(0, 2**16, (rows, groups, block)) >> (16 - widths.astype(int))[..., None]).astype(np.uint16)
    of_class = [wanted[(widths == w) & (bins[:, None] == b)].reshape(-1) for w in range(17) for b in range(2)]
    streams = [DecodedStream(i // 2, len(v), planes(pack(v, i // 2), i // 2, len(v))) for i, v in enumerate(of_class)]
    grouping, out = Grouping(rows, groups * block, block, widths, bins, classes), np.empty((rows, groups * block), np.uint16)
    unpacking.fill_in_order(Streams(streams), np.zeros(34, np.int64), grouping, None, out)
    assert np.array_equal(out, wanted.reshape(rows, -1))


@pytest.mark.parametrize(("widths_shape", "bins"), [((6, 5), 6), ((6, 5), 1), ((6, 1), 6), ((1, 1), 6), ((1, 1), 1)])
def test_cells_are_counted(kernel, widths_shape, bins):
    generator = np.random.default_rng(0)
    widths, bins = generator.integers(1, 17, widths_shape, np.uint8), generator.integers(0, 3, bins, np.uint8)
    number, some = (5, slice(1, 4)) if widths_shape[1] > 1 else (1, slice(0, 1))
    found = count_cells(Grouping(6, number * 4, 4, widths, bins, np.zeros((17, 3), np.uint16)), some)
    wanted = np.zeros((17, 3), np.int64)
    for row in range(6):
        for group in range(some.start, some.stop):
            wanted[np.broadcast_to(widths, (6, number))[row, group], np.broadcast_to(bins, 6)[row]] += 1
    assert np.array_equal(found, wanted)


def test_without_a_kernel_nothing_is_called(monkeypatch):
    monkeypatch.setenv("DIFFQ_FX_KERNELS", "torch")
    monkeypatch.setattr(extension, "kernels", extension.kernels.__wrapped__)
    grid = Grid(np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), None, None)
    with pytest.raises(RuntimeError, match="the kernels in C, which this work was begun with, are no longer there"):
        unpacking.fill_in_order(Streams([]), np.zeros(0, np.int64), None, grid, np.zeros(0))


@pytest.mark.parametrize("present", [True, False], ids=["isal", "zlib"])
def test_deflate_streams_are_read_with_isal_and_without(present, monkeypatch):
    if present:
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setattr(deflate, "fast_zlib", deflate.fast_zlib.__wrapped__)
    assert deflate.fast_zlib().__name__ == ("isal.isal_zlib" if present else "zlib")
    data = np.minimum(np.random.default_rng(0).geometric(0.3, 200_000), 255).astype(np.uint8)
    coded = deflate.encode(data)
    assert np.array_equal(deflate.decode(memoryview(coded), len(data)), data)
    generator, refused = np.random.default_rng(1), 0
    for _ in range(300):
        damaged = bytearray(coded)
        damaged[generator.integers(len(coded))] ^= 1 << generator.integers(8)
        try:
            assert len(deflate.decode(memoryview(damaged), len(data))) == len(data)
        except deflate.PackedFileError:
            refused += 1
    assert refused > 100
    for wrong in (coded[:-1], coded + b"x", b""):
        with pytest.raises(deflate.PackedFileError, match="coded plane"):
            deflate.decode(memoryview(wrong), len(data))
    for size in (1, len(data) - 1, len(data) + 1):
        with pytest.raises(deflate.PackedFileError, match=f"a coded plane does not hold {size} bytes"):
            deflate.decode(memoryview(coded), size)
