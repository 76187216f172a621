"""Packed integers: every width and layout comes back exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffq_fx import functional
from diffq_fx.functional.groups import to_rows
from diffq_fx.storage import IntegerWeight
from diffq_fx.storage.codebook import codebook_footprint
from diffq_fx.storage.footprint import grid_footprint
from diffq_fx.storage.packing import CONTAINER_BITS, container_for, narrowed, pack_levels, table_key, unpack_levels
from diffq_fx.weights import WeightSpec


@settings(deadline=None)
@given(width=st.sampled_from(CONTAINER_BITS), numel=st.integers(1, 67), seed=st.integers(0, 999))
def test_pack_and_unpack_are_inverse(width, numel, seed):
    levels = torch.randint(0, 2**width, (numel,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    packed = pack_levels(levels, width)
    assert packed.numel() == -(-numel * width // 8)
    assert torch.equal(unpack_levels(packed, width, numel), levels)


@pytest.mark.parametrize(("bits", "width"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16)])
def test_smallest_container(bits, width):
    assert container_for(bits) == width


def make(shape, axis, bits, group_size, grid, dtype=torch.float32):
    spec = WeightSpec(name="w", shape=shape, axis=axis, dtype=dtype, group_size=group_size, grid=grid)
    weight = torch.randn(shape, dtype=dtype)
    width = torch.full(spec.bits_layout.shape, bits, dtype=torch.int32)
    rows_OI = to_rows(weight, axis)
    low, high = functional.grid_range(*spec.range_layout.aminmax(rows_OI), grid)
    params = functional.quant_params(low, high, width, grid)
    levels = functional.quantize(rows_OI.to(low.dtype), params, width, spec.scale_layout)
    return weight, IntegerWeight(spec, levels, params, width), params


@pytest.mark.parametrize("grid", ["affine", "half", "symmetric", "float"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8, 12, 16])
@pytest.mark.parametrize(
    ("shape", "axis", "group_size"), [((6, 10), 0, "channel"), ((4, 6, 3, 3), 1, "tensor"), ((5, 11), 0, 4), ((3, 7), 1, 1)]
)
def test_stored_weight_is_close_to_the_weight(shape, axis, group_size, bits, grid):
    weight, stored, params = make(shape, axis, bits, group_size, grid)
    restored = stored()
    assert restored.shape == weight.shape
    assert restored.is_contiguous()
    assert float((restored - weight).abs().max()) <= float(params.scale.max()) / 2 + 1e-5
    assert stored.footprint().payload_bits == weight.numel() * bits
    assert stored.levels.numel() == -(-weight.numel() * stored.container_bits // 8)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("group_size", ["channel", "tensor", 4])
def test_half_integer_zero_points(bits, group_size):
    """What the operator computes is what integers about an integer give; types of the model leave zero points as they are."""
    _, stored, params = make((6, 10), 0, bits, group_size, "half")
    assert (stored.zero_point % 1 == 0.5).any()
    layout = stored.spec.scale_layout
    doubled = functional.QuantParams(params.scale / 2, (2 * params.zero_point).int(), None)
    assert torch.equal(stored(), functional.dequantize(2 * stored.levels_OI(), doubled, layout))
    args = (stored.levels, stored.scale, stored.zero_point, None, stored.container_bits, [6, 10], 0, layout.block, torch.float32)
    torch.library.opcheck(torch.ops.diffq_fx.dequantize.default, args)
    expected = stored()
    assert torch.equal(stored.to(torch.float16)(), expected.half())
    assert stored.zero_point.dtype == torch.float32


def test_sizes_of_half_integer_zero_points():
    spec = WeightSpec(name="w", shape=(2, 8), axis=0, grid="half")
    found = grid_footprint(spec, torch.tensor([[1], [2]]))
    assert found.packed_bits == (8 + 2 + 32) + (16 + 3 + 32) + 8 + 2, (
        "levels, a zero point of a bit more, a scale; limits and codes of widths"
    )
    assert (found.container_bits, found.container_scale_bits) == (2, 2 * (32 + 4)), "zero points up to 6 in four bits"
    for bits, second in ((1, 2), (3, 4), (4, 4), (8, 8)):
        assert grid_footprint(spec, torch.full((2, 1), bits)).container_scale_bits == 2 * (32 + second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_as_such(dtype):
    weight, stored, params = make((6, 10), 0, 8, "channel", "affine", dtype)
    assert stored().dtype == dtype
    assert float((stored().double() - weight.double()).abs().max()) <= float(params.scale.max()) * 0.51 + 0.02


def test_the_operator_is_registered_as_torch_expects():
    _, stored, _ = make((6, 10), 0, 4, 4, "affine")
    args = (stored.levels, stored.scale, stored.zero_point, None, stored.container_bits, [6, 10], 0, 4, torch.float32)
    torch.library.opcheck(torch.ops.diffq_fx.dequantize.default, args)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pieces_of_a_large_weight_begin_on_whole_bytes(bits):
    """Rows of odd length: worked out piece by piece, the weight is that of all levels at once."""
    spec = WeightSpec(name="w", shape=(9001, 51), axis=0)
    levels = torch.randint(2**bits, spec.shape, dtype=torch.int32)
    params = functional.QuantParams(torch.rand(9001, 1) + 0.5, torch.randint(2**bits, (9001, 1), dtype=torch.int32), None)
    stored = IntegerWeight(spec, levels, params, torch.full((9001, 1), bits))
    assert len(list(spec.scale_layout.row_slices(torch.device("cpu")))) > 1
    assert torch.equal(stored(), functional.dequantize(levels, params, spec.scale_layout))


@pytest.mark.parametrize(("scale", "beside"), [(None, 5 * 2 * 32), (torch.tensor(0.5), 5 * 2 * 32 + 32)])
def test_what_a_codebook_takes(scale, beside):
    found = codebook_footprint(100, torch.zeros(5, 2), scale)
    assert (found.histogram, found.scale_bits, found.container_bits, found.container_scale_bits) == ({3: 100}, beside, 4, beside)
    assert (found.packed_bits, found.payload_bits, found.container_payload_bits) == (300 + beside, 300, 400)
    assert (found.coding_bits, found.grid) == (0, "codebook")


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 255, torch.uint8),
        (-128, 127, torch.int8),
        (-1, 255, torch.int16),
        (0, 65535, torch.uint16),
        (-1, 40000, torch.int32),
        (-1, 65535, torch.int32),
        (0, 2**31, torch.int64),
    ],
)
def test_integer_tables_take_the_smallest_type_that_holds_them(low, high, dtype):
    table = torch.zeros(64, dtype=torch.int64)  # of 512 bytes: the smallest that is worth it
    table[0], table[1] = low, high
    assert narrowed(table).dtype == dtype
    assert torch.equal(narrowed(table).long(), table)
    assert narrowed(table[:63]).dtype == torch.int64
    assert narrowed(table.float()).dtype == torch.float32
    assert table_key(table) == table_key(table.clone())
    assert table_key(table[:63]) != table_key(table[:63].clone())
    assert table_key(table.float()) != table_key(table.float().clone())


def test_the_parts_of_a_footprint():
    own = WeightSpec(name="w", shape=(3, 8), axis=0)
    found = grid_footprint(own, torch.tensor([[3], [6], [3]]))
    assert (found.histogram, found.coding_bits, found.payload_bits) == ({3: 16, 6: 8}, 3 * 2, 96)
    assert found.scale_bits == 3 * 32 + 3 + 6 + 3 + 8, "scales, zero points as wide as their levels, limits of the widths"
    assert (found.container_bits, found.container_scale_bits, found.container_payload_bits) == (8, 3 * (32 + 8), 24 * 8)
    assert found.packed_bits == 96 + 116 + 6
