"""Rounding with error compensation: on the grid bit by bit, and better for the layer's output than the nearest levels."""

import pytest
import torch

from diffq_fx import functional
from diffq_fx.budget.coded_levels import PRICE, CodedLevels
from diffq_fx.budget.entropy import RoundedWeight, level_counts
from diffq_fx.functional import QuantParams, dequantize, quantize
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.post_training import compensation
from diffq_fx.post_training.compensation import compensate, output_error, shrunk
from diffq_fx.weights import WeightSpec

GRIDS = ["affine", "half", "symmetric", "float"]


def second_moments(columns, groups=1, inputs=500):
    """Of correlated inputs whose sizes differ."""
    x = torch.randn(groups, inputs, columns) @ (torch.randn(groups, columns, columns) * torch.linspace(2, 0.1, columns))
    return x.mT @ x / inputs


def grid_of(rows, group_size, range_size, bits, grid="affine"):
    """Parameters, widths and layout of the scale; ``bits`` is one width or the least and the most."""
    shape = rows.shape
    groups, ranges = (GroupLayout.of(*shape, size) for size in (group_size, range_size))
    least, most = bits if isinstance(bits, tuple) else (bits, bits)
    widths = torch.randint(least, most + 1, groups.shape, dtype=torch.int32)
    low, high = functional.grid_range(*ranges.aminmax(rows), grid)
    params = functional.quant_params(low * 0.9, high * 0.9, widths, grid)
    layout = GroupLayout.of(*shape, group_size if ranges.kind == "tensor" or groups.kind == "block" else range_size)
    return params, widths, layout


def nearest(rows, params, bits, layout):
    return functional.dequantize(functional.quantize(rows, params, bits, layout), params, layout)


CASES = {
    "channel": ("channel", "channel", (1, 6)),
    "tensor": ("tensor", "tensor", 3),
    "blocks": (16, 16, (2, 5)),
    "short last block": (20, 20, (2, 5)),
    "widths in blocks, one range a channel": (16, "channel", (1, 5)),
    "ranges in blocks, one width": ("tensor", 16, 3),
    "a width for each weight": (1, "channel", (1, 8)),
    "a width for each weight, one range": (1, "tensor", (1, 8)),
    "1 bit": ("channel", "channel", 1),
    "16 bits": ("channel", "channel", 16),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", CASES)
def test_values_are_on_the_grid_and_better(case, grid, monkeypatch):
    monkeypatch.setattr(compensation, "_BLOCK", 24)  # so that there are several
    monkeypatch.setattr(compensation, "_PIECE", 5 * 72)
    rows, moments = torch.randn(24, 72), second_moments(72)
    group_size, range_size, bits = CASES[case]
    params, widths, layout = grid_of(rows, group_size, range_size, bits, grid)
    values = compensate(rows, moments, params, widths, layout)
    assert torch.equal(nearest(values, params, widths, layout), values)
    found, plain = (output_error(each - rows, moments) for each in (values, nearest(rows, params, widths, layout)))
    assert bool((found <= plain * (1 + 1e-5)).all())
    assert float(found.sum()) < 0.9 * float(plain.sum())


def reference(row, moments, params, widths, damping):
    """One row by the formulas of OBS, in float64: after each column the inverse of what is left."""
    layout = GroupLayout.of(1, row.shape[1], 8)
    w, q = row[0].double(), torch.zeros(row.shape[1])
    damped = moments.double() + damping * moments.double().diagonal().mean() * torch.eye(len(w))
    for at in range(len(w)):
        rest = slice(at, None)
        inverse = torch.linalg.inv(damped[rest, rest])
        q[at] = nearest(w[None].float(), params, widths, layout)[0, at]
        w[rest] -= (w[at] - q[at]) / inverse[0, 0] * inverse[0]
    return q


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_obs(grid):
    moments, rows = second_moments(20), torch.randn(8, 20)
    params, widths, layout = grid_of(rows, 8, 8, 3, grid)
    values, plain = compensate(rows, moments, params, widths, layout, damping=0.02, falling=False), nearest(rows, params, widths, layout)
    expected = torch.stack(
        [reference(rows[i : i + 1], moments[0], params.of_rows(slice(i, i + 1)), widths[i : i + 1], 0.02) for i in range(8)]
    )
    better = output_error(expected - rows, moments) <= output_error(plain - rows, moments)
    assert better.sum() > 4
    assert torch.equal(values, torch.where(better[:, None], expected, plain))


@pytest.mark.parametrize("case", ["channel", "blocks", "widths in blocks, one range a channel"])
def test_the_length_of_the_code_counts_where_it_is_asked_for(case):
    """Less error and code together, in the squared steps that a bit is worth, than the nearest levels and than choosing without moments."""
    rows, moments = torch.randn(24, 72), second_moments(72)
    group_size, range_size, bits = CASES[case]
    params, widths, layout = grid_of(rows, group_size, range_size, bits)
    spec = WeightSpec(name="w", shape=(24, 72), axis=0, group_size=group_size, range_size=range_size, grid="affine")
    weight = RoundedWeight(spec, rows, widths, params)
    code = CodedLevels(weight, PRICE)
    values = compensate(rows, moments, params, widths, layout, code=code)
    assert torch.equal(nearest(values, params, widths, layout), values)
    alone, found = code.cheapest(weight).rows, compensate(rows, moments, params, widths, layout)
    counts = [level_counts(weight._replace(rows=each)) for each in (values, alone, found, rows)]
    lengths = [-float(torch.xlogy(each, each / each.sum(1, keepdim=True).clamp(min=1)).sum()) for each in counts]
    errors = [float(output_error(each - rows, moments).sum()) for each in (values, alone)]
    assert lengths[0] < lengths[2]
    assert lengths[1] < lengths[3]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("coded", [False, True])
def test_kept_weights_take_their_nearest_levels_and_others_make_up_for_them(coded):
    rows, moments, kept = torch.randn(24, 72), second_moments(72), torch.rand(24, 72) < 0.1
    params, widths, layout = grid_of(rows, "channel", "channel", 3)
    spec = WeightSpec(name="w", shape=(24, 72), axis=0, group_size="channel", range_size="channel", grid="affine")
    code = CodedLevels(RoundedWeight(spec, rows, widths, params), PRICE) if coded else None
    values = compensate(rows, moments, params, widths, layout, code=code, kept_OI=kept)
    free, plain = compensate(rows, moments, params, widths, layout, code=code), nearest(rows, params, widths, layout)
    assert torch.equal(values[kept], plain[kept])
    errors = [float(output_error(each - rows, moments).sum()) for each in (values, torch.where(kept, plain, free), plain)]
    assert errors[0] < min(errors[1:])


def test_falling_order_is_the_same_with_columns_in_that_order():
    moments, rows = second_moments(30), torch.randn(8, 30)
    params, widths, layout = grid_of(rows, "channel", "channel", 3)
    order = moments[0].diagonal().argsort(descending=True)
    by_hand = compensate(rows[:, order], moments[:, order][:, :, order], params, widths, layout, falling=False)
    assert torch.equal(compensate(rows, moments, params, widths, layout)[:, order], by_hand)


def test_parts_of_the_rows_have_moments_of_their_own():
    moments, rows = second_moments(9, groups=4), torch.randn(12, 9)
    params, widths, layout = grid_of(rows, "channel", "channel", (2, 4))
    values = compensate(rows, moments, params, widths, layout, falling=False)
    for group in range(4):
        part = slice(3 * group, 3 * group + 3)
        own = compensate(rows[part], moments[group], params.of_rows(part), widths[part], layout.of_rows(part), falling=False)
        torch.testing.assert_close(values[part], own)


def test_columns_without_inputs_take_the_nearest_level_and_nothing_from_others():
    moments, rows = second_moments(12), torch.randn(6, 12)
    dead = [0, 5, 11]
    moments[:, dead], moments[:, :, dead] = 0, 0
    params, widths, layout = grid_of(rows, "channel", "channel", 3)
    values = compensate(rows, moments, params, widths, layout)
    assert torch.equal(values[:, dead], nearest(rows, params, widths, layout)[:, dead])
    assert torch.equal(compensate(rows, torch.zeros(12, 12), params, widths, layout), nearest(rows, params, widths, layout))


def test_fewer_inputs_than_columns():
    """Their moments have no inverse, and in float32 not even a Cholesky factor with little damping."""
    rows = torch.randn(6, 64)
    moments = second_moments(64, inputs=3) * 1e6
    params, widths, layout = grid_of(rows, "channel", "channel", 3)
    for damping in (1e-2, 1e-9):
        values = compensate(rows, moments, params, widths, layout, damping=damping)
        assert float(output_error(values - rows, moments).sum()) < 0.2 * float(
            output_error(nearest(rows, params, widths, layout) - rows, moments).sum()
        )


def test_the_diagonal_alone_gives_the_nearest_levels():
    rows = torch.randn(6, 12)
    params, widths, layout = grid_of(rows, "channel", "channel", 3)
    assert torch.equal(compensate(rows, torch.rand(1, 12), params, widths, layout), nearest(rows, params, widths, layout))


def test_half_precision_weights():
    rows = torch.randn(6, 32).bfloat16()
    params, widths, layout = grid_of(rows, "channel", "channel", 3)
    values = compensate(rows, second_moments(32), params, widths, layout)
    assert values.dtype == torch.float32
    assert torch.equal(nearest(values, params, widths, layout), values)


def test_bad_input():
    rows = torch.randn(6, 12)
    params, widths, layout = grid_of(rows, "channel", "channel", 3)
    with pytest.raises(ValueError, match=r"expected rows of shape \(6, 12\) and moments of shape \(G, 12, 12\).* and \(1, 13, 13\)"):
        compensate(rows, second_moments(13), params, widths, layout)
    with pytest.raises(ValueError, match="divisor of 6"):
        compensate(rows, second_moments(12, groups=4), params, widths, layout)
    with pytest.raises(ValueError, match="not finite"):
        compensate(rows, torch.full((12, 12), float("nan")), params, widths, layout)
    with pytest.raises(ValueError, match="negative eigenvalues"):
        compensate(rows, torch.eye(12) - 0.5, params, widths, layout)


@pytest.mark.parametrize("rows", [32, 64, 256])
def test_few_inputs_that_correlate_by_chance_do_no_harm(rows):
    weight, params, bits, layout = torch.randn(64, 64), *_grid_of_3_bits(64, 64)
    seen, others = torch.randn(rows, 64), torch.randn(4000, 64)
    moments = seen.mT @ seen / rows
    nearest = dequantize(quantize(weight, params, bits, layout), params, layout)
    errors = {}
    for name, matrix in (("shrunk", shrunk(moments[None], rows)), ("as they are", moments[None])):
        found = compensate(weight, matrix, params, bits, layout) - weight
        errors[name] = float((others @ found.mT).square().mean())
    plain = float((others @ (nearest - weight).mT).square().mean())
    assert errors["shrunk"] <= 1.01 * plain
    assert errors["as they are"] > 1.01 * plain  # what it is good for


@pytest.mark.parametrize("count", [0.5, 1, 2, 100])
def test_moments_of_nothing_and_of_one_column_are_left_alone(count):
    assert torch.equal(shrunk(torch.zeros(1, 3, 3), count), torch.zeros(1, 3, 3))
    assert torch.equal(shrunk(torch.full((1, 1, 1), 4.0), count), torch.full((1, 1, 1), 4.0))


def test_what_inputs_have_in_common_stays():
    common = torch.randn(64, 64) / 8
    seen = torch.randn(256, 64) @ (common + torch.ones(64, 64) / 8)
    moments = (seen.mT @ seen / 256)[None]
    kept = shrunk(moments, 256)
    assert torch.equal(kept.diagonal(dim1=-2, dim2=-1), moments.diagonal(dim1=-2, dim2=-1))
    assert float((kept - moments).norm() / moments.norm()) < 0.05


def _grid_of_3_bits(rows, columns):
    scale = torch.full((rows, 1), 0.8)
    return (
        QuantParams(scale, torch.full((rows, 1), 4, dtype=torch.int32), None),
        torch.full((rows, 1), 3),
        GroupLayout.of(rows, columns, "channel"),
    )
