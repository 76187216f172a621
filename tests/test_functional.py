"""The grid: properties that must hold for every width, layout and kind of grid."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffq_fx import functional
from diffq_fx.functional.groups import TILE, GroupLayout, combine, from_rows, largest_in, rows_of, scale_layout_of, tiles, to_rows
from diffq_fx.functional.precision import keeping_dtype

EPS = torch.finfo(torch.float32).eps

group_sizes = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 20))
grids = st.sampled_from(["affine", "half", "symmetric", "float"])


@st.composite
def rows(draw):
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator) * 10 ** draw(st.integers(-6, 4)) + draw(st.sampled_from([0.0, 1.0, -3.0]))
    return torch.full_like(weight, weight[0, 0].item()) if draw(st.booleans()) and draw(st.booleans()) else weight


def round_trip(rows_OI, bits, group_size, range_size, grid):
    o, i = rows_OI.shape
    bits_layout, range_layout = GroupLayout.of(o, i, group_size), GroupLayout.of(o, i, range_size)
    layout = combine(bits_layout, range_layout)
    low, high = functional.grid_range(*range_layout.aminmax(rows_OI), grid)
    params = functional.quant_params(low, high, bits, grid)
    levels = functional.quantize(rows_OI, params, bits, layout)
    return levels, params, layout, functional.dequantize(levels, params, layout)


@settings(deadline=None, max_examples=300)
@given(
    rows_OI=rows(), bits=st.integers(1, 16), group_size=group_sizes, range_per=st.sampled_from(["tensor", "channel", "group"]), grid=grids
)
def test_error_is_within_half_a_step(rows_OI, bits, group_size, range_per, grid):
    layout = GroupLayout.of(*rows_OI.shape, group_size)
    width = torch.full(layout.shape, bits, dtype=torch.int32)
    levels, params, scale_layout, restored = round_trip(rows_OI, width, group_size, group_size if range_per == "group" else range_per, grid)
    bound = scale_layout.expand(params.scale) / 2 + 4 * EPS * rows_OI.abs().max()
    constant = bool((rows_OI.max() == rows_OI.min()).all())
    error = (restored - rows_OI).abs()
    assert bool((error <= bound).all()), (error - bound).max()
    assert int(levels.min()) >= 0
    assert int(levels.max()) <= 2**bits - 1
    if constant and grid != "symmetric":  # one value is a level of its own (a symmetric grid has none at +max)
        assert float(error.max()) <= 4 * EPS * float(rows_OI.abs().max())


@settings(deadline=None, max_examples=100)
@given(rows_OI=rows(), group_size=group_sizes, seed=st.integers(0, 1000))
def test_mixed_widths_stay_within_their_own_levels(rows_OI, group_size, seed):
    layout = GroupLayout.of(*rows_OI.shape, group_size)
    bits = torch.randint(1, 17, layout.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    levels, params, scale_layout, restored = round_trip(rows_OI, bits, group_size, "channel", "affine")
    top = scale_layout.expand((2**bits - 1).expand_as(params.scale))
    assert bool((levels <= top).all())
    assert bool(((params.zero_point >= 0) & (params.zero_point <= (2**bits - 1))).all())
    bound = scale_layout.expand(params.scale) / 2 + 4 * EPS * rows_OI.abs().max()
    assert bool(((restored - rows_OI).abs() <= bound).all())


@settings(deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_rows_and_back(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    weight = torch.randn(shape)
    rows_OI = to_rows(weight, axis)
    assert rows_OI.shape == (shape[axis], weight.numel() // shape[axis])
    assert torch.equal(from_rows(rows_OI, tuple(shape), axis), weight)
    assert torch.equal(rows_OI[0].reshape(-1), weight.select(axis, 0).reshape(-1))


@settings(deadline=None)
@given(rows_OI=rows(), group_size=group_sizes)
def test_group_reductions_against_loops(rows_OI, group_size):
    layout = GroupLayout.of(*rows_OI.shape, group_size)
    low, high = layout.aminmax(rows_OI)
    total, counts = layout.sum(rows_OI.double()), layout.counts()
    assert low.shape == high.shape == total.shape == counts.shape == layout.shape
    assert int(counts.sum()) == rows_OI.numel()
    for r in range(layout.shape[0]):
        for c in range(layout.shape[1]):
            part = rows_OI if layout.kind == "tensor" else rows_OI[r, c * layout.block : (c + 1) * layout.block]
            assert low[r, c] == part.min()
            assert high[r, c] == part.max()
            assert counts[r, c] == part.numel()
            torch.testing.assert_close(total[r, c], part.double().sum())


@settings(deadline=None)
@given(rows_OI=rows(), group_size=group_sizes)
def test_values_of_groups_against_loops(rows_OI, group_size):
    layout = GroupLayout.of(*rows_OI.shape, group_size)
    assert (layout.kind == "block") == (isinstance(group_size, int) and group_size < rows_OI.shape[1])
    values = torch.randn(layout.shape)
    spread = layout.expand(values).expand(rows_OI.shape)
    for r, c in itertools.product(*map(range, rows_OI.shape)):
        assert spread[r, c] == values[0 if layout.kind == "tensor" else r, 0 if layout.kind != "block" else c // group_size]
    counts = layout.counts_on(torch.device("cpu"))
    assert torch.equal(torch.as_tensor(counts).expand(layout.shape).double(), layout.counts().double())
    assert isinstance(counts, float) == (layout.kind != "block" or rows_OI.shape[1] % layout.block == 0)
    assert torch.equal(largest_in(values, (1, 1)), values.max().view(1, 1))
    assert torch.equal(largest_in(values, (values.shape[0], 1)), values.amax(1, keepdim=True))
    assert largest_in(values, values.shape) is values
    found = scale_layout_of(values, layout.rows, layout.columns, layout.block)
    assert (found.shape, found.block) == (layout.shape, layout.block)
    assert combine(layout, GroupLayout.of(*rows_OI.shape, "tensor")) is layout
    assert combine(GroupLayout.of(*rows_OI.shape, "tensor"), layout).shape == layout.shape


@pytest.mark.parametrize(
    "shape", [(5,), (TILE + 3,), (3 * TILE,), (7, TILE // 3), (3, 2 * TILE), (0, 4), (5, 0), (1000, 3, 700), (20, TILE // 5)]
)
def test_tiles_cover_all_and_stay_small(shape):
    pieces = list(tiles(shape, torch.device("cpu")))
    assert [row for piece in pieces for row in range(*piece.indices(shape[0]))] == list(range(shape[0]))
    inner = math.prod(shape[1:])
    longest = max((len(range(*piece.indices(shape[0]))) for piece in pieces), default=0)
    assert longest == min(shape[0], max(1, TILE // max(inner, 1))), "as many rows as the cache holds"
    if len(shape) == 2:
        layout = GroupLayout.of(*shape, "channel")
        own = list(layout.row_slices(torch.device("cpu")))
        assert [row for piece in own for row in range(piece.start, piece.stop)] == list(range(shape[0]))
        assert all(piece.start % 8 == 0 for piece in own)
        assert all((piece.stop - piece.start) * shape[1] <= max(TILE, 8 * shape[1]) for piece in own)
        assert len(own) == (-(-shape[0] // max(8, TILE // max(shape[1], 1) // 8 * 8)))
        assert all(layout.of_rows(piece).rows == piece.stop - piece.start for piece in own)
        assert list(layout.row_slices(torch.device("meta"))) == ([slice(0, shape[0])] if shape[0] else [])
    assert len(list(tiles(shape, torch.device("meta")))) == min(shape[0], 1)


def test_values_that_all_rows_share_stay_as_they_are():
    shared, own = torch.randn(1, 3), torch.randn(5, 3)
    assert rows_of(shared, slice(2, 4)) is shared
    assert torch.equal(rows_of(own, slice(2, 4)), own[2:4])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 16])
def test_a_half_integer_zero_point_centres_the_levels_and_doubles_to_integers(bits):
    low, width, layout = torch.tensor([[-1.0], [-1.0], [0.0]]), torch.full((3, 1), bits), GroupLayout.of(3, 7, "channel")
    params = functional.quant_params(low, torch.tensor([[1.0], [0.3], [2.0]]), width, "half")
    assert params.zero_point.dtype == torch.float32
    top = 2**bits - 1
    assert float(params.zero_point[0]) % 1 == (0.5 if bits <= 2 else 0)
    assert float(params.zero_point[2]) == 0
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    levels = functional.quantize(rows, params, width, layout)
    weights = functional.dequantize(levels, params, layout)
    every = functional.dequantize(torch.arange(top + 1).expand(3, -1), params, layout)
    nearest = (every.unsqueeze(1) - rows.unsqueeze(2)).abs().amin(2)
    torch.testing.assert_close((weights - rows).abs(), nearest, rtol=1e-5, atol=1e-6)
    doubled = functional.QuantParams(params.scale / 2, (2 * params.zero_point).int(), None)
    assert torch.equal(functional.dequantize(2 * levels, doubled, layout), weights)
    if bits == 1:
        assert every[0].tolist() == [-1, 1]


@pytest.mark.parametrize("bits", [1, 2, 8, 15, 16])
def test_step_matches_its_formula(bits):
    step = functional.step_size(torch.tensor(-1.5), torch.tensor(2.5), torch.tensor(float(bits)))
    assert step.item() == pytest.approx(4.0 / (2**bits - 1), rel=1e-6)


def test_gradients_stay_finite_at_both_limits():
    logits = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    bits = functional.bits_from_logits(logits, 1, 16)
    functional.step_size(torch.tensor(-1.0), torch.tensor(1.0), bits).sum().backward()
    assert bits.tolist() == [1.0, 8.5, 16.0]
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("gain", [1.0, 10.0])
def test_bits_and_logits_are_inverse(gain):
    bits = torch.tensor([2.5, 4.0, 7.5])
    logits = functional.logits_from_bits(bits, 2, 8, gain)
    torch.testing.assert_close(functional.bits_from_logits(logits, 2, 8, gain), bits)


def test_a_one_percent_scale_error_would_be_seen():
    rows_OI = torch.randn(4, 64)
    bits = torch.full((4, 1), 8, dtype=torch.int32)
    levels, params, layout, restored = round_trip(rows_OI, bits, "channel", "channel", "affine")
    wrong = functional.dequantize(levels, params._replace(scale=params.scale * 1.01), layout)
    bound = params.scale / 2 + 4 * EPS * rows_OI.abs().max()
    assert bool(((restored - rows_OI).abs() <= bound).all())
    assert not bool(((wrong - rows_OI).abs() <= bound).all())


def test_params_without_a_zero_point_and_of_some_rows():
    scale, offset = torch.rand(3, 1).half(), torch.rand(3, 1).bfloat16()
    on_floats = functional.QuantParams(scale, None, offset)
    with pytest.raises(ValueError, match="a float grid has an offset and no zero_point"):
        on_floats.known_zero_point()
    assert [each if each is None else each.dtype for each in on_floats.widened()] == [torch.float32, None, torch.float32]
    whole = functional.QuantParams(scale.double(), torch.arange(3, dtype=torch.int32)[:, None], None)
    assert [each if each is None else each.dtype for each in whole.widened()] == [torch.float64, torch.int32, None]
    assert whole.known_zero_point() is whole.zero_point
    assert whole.of_rows(slice(1, 3)).zero_point.tolist() == [[1], [2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_are_worked_out_in_float32_or_better(dtype):
    low, high = functional.grid_range(torch.tensor([[1.0]], dtype=dtype), torch.tensor([[3.0]], dtype=dtype), "float")
    assert low.dtype == high.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (low.item(), high.item()) == (1, 3)


def test_logits_of_bits_at_a_limit_are_those_a_hundredth_of_the_way_within():
    share = functional.bits_from_logits(functional.logits_from_bits(torch.tensor([1.0, 2.0, 8.0, 9.0]), 2, 8), 0, 1)
    torch.testing.assert_close(share, torch.tensor([0.01, 0.01, 0.99, 0.99]))


def test_a_move_that_changes_the_type_leaves_it_alone():
    x = torch.ones(3)
    assert keeping_dtype(torch.Tensor.half)(x).dtype == torch.float32
    moved = keeping_dtype(torch.clone)(x)
    assert moved is not x
    assert torch.equal(moved, x)
    assert keeping_dtype(lambda tensor: tensor.half().to("meta"))(x).device.type == "meta"


@pytest.mark.parametrize("grid", ["affine", "half"])
def test_a_zero_point_is_a_level_even_where_the_range_does_not_hold_zero(grid):
    low, high = torch.tensor([[-3.0], [1.0]]), torch.tensor([[-1.0], [3.0]])
    params = functional.quant_params(low, high, torch.full((2, 1), 2), grid)
    assert params.zero_point.flatten().tolist() == [3, 0]
