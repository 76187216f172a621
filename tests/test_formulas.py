"""The formulas of the size, its controller and the code, each against one written out plainly on a few numbers."""

import math
from collections import Counter

import pytest
import torch

from diffq_fx import functional
from diffq_fx.budget import sensitivity
from diffq_fx.budget.allocation import allocate_coded_widths, fill_up, nearest_widths
from diffq_fx.budget.bit_state import BitState
from diffq_fx.budget.code_length import expected_code_length
from diffq_fx.budget.coded_levels import CodedLevels
from diffq_fx.budget.entropy import RoundedWeight, bits_saved, coded_bits, rest_in_file
from diffq_fx.budget.flat_groups import FlatGroups, WidthLimits
from diffq_fx.budget.pressure import add_penalty, gradient_sums, open_rows, project, same_bits, shift_to, worth_of_a_bit
from diffq_fx.budget.size import expected_bits, size_and_growth
from diffq_fx.functional.groups import to_rows
from diffq_fx.methods.predicted_loss import surely_less
from diffq_fx.weights import WeightSpec

CPU = torch.device("cpu")


def spec(shape=(4, 12), **settings):
    return WeightSpec(name="w", shape=shape, axis=0, **settings)


def code_length(values):
    """Bits of an order-0 entropy code."""
    counts = Counter(values)
    return -sum(n * math.log2(n / len(values)) for n in counts.values())


# --- the controller


def controlled(further=0.0):
    specs = [spec(), spec(shape=(3, 6), group_size=3), spec(shape=(2, 2), group_size="tensor")]
    groups = FlatGroups(specs, CPU, limits=[WidthLimits(2, 8), WidthLimits(2, 8), WidthLimits(3, 5)])
    logits = [(further + torch.randn(each.bits_layout.shape) / 10).requires_grad_() for each in specs]
    state = BitState(groups, logits)
    growth = torch.autograd.grad(expected_bits(state), logits)
    return BitState(groups, [each.detach() for each in logits]), growth


def in_a_row(tensors):
    return torch.cat([each.flatten() for each in tensors]).double()


@pytest.mark.parametrize(
    ("scale", "further", "noise"),
    [(1.0, 0.0, 1.0), (4.0, 0.0, 1.0), (1.0, 1.5, 1.0), (1.0, 0.0, 0.03)],
    ids=["as they are", "scaled", "bits near their limit", "hardly more than the size"],
)
def test_what_only_changes_the_size_is_taken_out_of_the_gradients(scale, further, noise):
    state, growth = controlled(further)
    grads = [noise * torch.randn_like(each) + (each if noise < 1 else 0) for each in growth]
    g, n = in_a_row(grads) / scale, in_a_row(growth)
    with open_rows(state, dict(enumerate(grads))) as rows:
        sums = gradient_sums(state, rows, scale)
        torch.testing.assert_close(sums.double(), torch.stack([g.sum(), n.sum(), g @ g, g @ n, n @ n, torch.tensor(len(g)).double()]))
        assert float(worth_of_a_bit(sums)) == pytest.approx(-float(g.sum() / n.sum()))
        project(state, rows, sums, scale)
    left = g - g.sum() / n.sum() * n
    torch.testing.assert_close(in_a_row(grads), scale * 1e-3 * left / left.square().mean().sqrt(), rtol=1e-3, atol=2e-6)


def test_gradients_that_say_nothing_stay_small():
    state, growth = controlled()
    for grads in ([3 * each for each in growth], [torch.zeros_like(each) for each in growth]):
        with open_rows(state, dict(enumerate(grads))) as rows:
            project(state, rows, gradient_sums(state, rows, 1.0), 1.0)
        assert 0 <= float(in_a_row(grads).abs().max()) < 1e-3


def test_gradients_of_many_groups_are_brought_to_the_same_size():
    state, growth = controlled()
    grads = [torch.randn_like(each) for each in growth]
    expected = 1e-3 * in_a_row(grads)
    with open_rows(state, dict(enumerate(grads))) as rows:
        project(state, rows, torch.tensor([0.0, 1.0, 1e8, 0.0, 0.0, 1e8]), 1.0)  # a hundred million groups, root mean square 1
    torch.testing.assert_close(in_a_row(grads), expected)


def test_a_penalty_is_the_derivative_of_the_size():
    state, growth = controlled()
    grads = [torch.randn_like(each) for each in growth]
    expected = in_a_row(grads) + 2.5 * in_a_row(growth)
    with open_rows(state, dict(enumerate(grads))) as rows:
        add_penalty(state, rows, 2.5)
    torch.testing.assert_close(in_a_row(grads), expected)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shift_meets_the_size_or_goes_as_far_as_it_may(sign):
    state, growth = controlled()
    before, budget = in_a_row(state.logits), round(float(size_and_growth(state)[0]))
    shift_to(state, budget + 4 * sign)
    moved = in_a_row(state.logits) - before
    torch.testing.assert_close(moved, torch.full_like(moved, 4 * sign / float(in_a_row(growth).sum())), rtol=0.2, atol=0)
    assert float(moved.std()) < 1e-6
    before = in_a_row(state.logits)
    shift_to(state, budget + sign * 10**6)
    torch.testing.assert_close(in_a_row(state.logits), before + sign * 0.05)
    for _ in range(20):
        shift_to(state, budget + sign * 10**6)
    torch.testing.assert_close(in_a_row(state.logits), torch.full_like(before, sign * 0.6))


def test_one_width_for_all_within_their_limits():
    groups = FlatGroups([spec(), spec(shape=(6, 5))], CPU, limits=[WidthLimits(2, 8), WidthLimits(1, 3)])
    for first, second in ((2.5, 2.5), (5.0, 3.0), (2.0, 1.5)):
        budget = round(4 * 13 * first + 6 * 6 * second) + groups.fixed_bits
        torch.testing.assert_close(same_bits(groups, budget), torch.tensor([first] * 4 + [second] * 6), rtol=1e-4, atol=1e-4)


# --- where the bits should go


def test_what_the_gradients_of_each_step_add():
    each, sums = spec(group_size=4), torch.zeros(4, 4, 3)
    grads = torch.randn(2, 4, 12)
    grads[0, 0] = 0
    grads[:, 1, :4] = 0
    for grad in grads:
        sensitivity.observe(each, grad, sums)
    squares = grads.square().view(2, 4, 3, 4).mean(3)
    torch.testing.assert_close(sums[0], squares.sum(0))
    assert torch.equal(sums[1], (squares > 0).sum(0).float())
    kept = sums.clone()
    for beyond in (torch.inf, -torch.inf, torch.nan):
        sensitivity.observe(each, torch.full((4, 12), beyond), sums)
        assert torch.equal(sums[0], kept[0])
    sensitivity.observe(each, None, sums)
    sensitivity.observe(each, torch.eye(4, 12).to_sparse(), sums)
    assert torch.equal(sums[0], kept[0])
    assert not sums[2:].any()


@pytest.mark.parametrize("group_size", ["tensor", "channel", 4])
def test_the_bits_that_groups_ask_for(group_size):
    each = spec(shape=(4, 10), group_size=group_size)
    shape, span = each.bits_layout.shape, torch.rand(4, 1) + 0.5
    sums = torch.stack([torch.rand(shape), torch.randint(1, 5, shape).float()])
    counts = each.bits_layout.counts().double()
    mean, trust = float((sums[0] * counts).sum() / counts.sum()), sums[1] / (sums[1] + 2)
    known = mean * (1 - trust) + sums[0] * trust
    torch.testing.assert_close(sensitivity.without_doubt(each, sums), known)
    together = span.square().mean().sqrt() if group_size == "tensor" else span
    torch.testing.assert_close(sensitivity.asked_bits(each, sums, span), torch.log2(together * known.sqrt()) / 2)


def test_the_curvature_is_twice_the_derivative_by_the_noise():
    each = spec(shape=(4, 10))
    slopes, noise = torch.tensor([[0.7], [-1.2], [0.4], [-0.3]]), torch.rand(4, 1) + 0.1
    growth = torch.tensor([[2.0], [-3.0], [0.0], [0.5]])
    sums = torch.stack([torch.rand(4, 1), torch.full((4, 1), 3.0), slopes, torch.zeros(4, 1)])
    assert sensitivity.asked_on_average(each, sums) is None
    assert all(not found.any() for found in sensitivity.measured_curvature(sums))
    sensitivity.measure_curvature(sums, noise, growth)
    expected = torch.where(growth == 0, 0, 2 * slopes / growth)
    curvature, variance = sensitivity.measured_curvature(sums)
    torch.testing.assert_close(curvature, expected)
    torch.testing.assert_close(variance, sums[0] / noise)
    beyond = torch.stack([torch.zeros(4, 1), torch.zeros(4, 1), torch.tensor([[1.0], [-1.0], [0.0], [1.0]]), torch.zeros(4, 1)])
    sensitivity.measure_curvature(beyond, noise, torch.tensor([[0.0], [0.0], [0.0], [2.0]]))
    assert beyond[2].flatten().tolist() == [0, 0, 0, 1]
    known = sensitivity.without_doubt(each, sums) * noise / 10
    assert sensitivity.asked_on_average(each, sums) == pytest.approx(float(known.log2().mean()) / 4)
    sums[0, :2], sums[1, :2] = 0, 1e9  # nothing depends on these groups: they are left out of the mean
    known = (sensitivity.without_doubt(each, sums) * noise / 10)[2:]
    assert sensitivity.asked_on_average(each, sums) == pytest.approx(float(known.log2().mean()) / 4, rel=1e-4)


def test_less_is_sure_from_two_standard_errors_on():
    variance, errors, than = torch.tensor([0.5, 0.25]), torch.tensor([1.0, 4.0]), torch.tensor([3.0, 3.0])  # by -2 and 1
    two_errors = 2 * math.sqrt(0.5 * 4 + 0.25)
    for share, is_sure in ((1.01, True), (0.99, False)):
        curvature = torch.tensor([(share * two_errors + 7) / 2, 7.0])
        assert surely_less(curvature, variance, errors, than) is is_sure
    assert not surely_less(variance, torch.zeros(2), errors, errors), "equal errors are not less"


def test_asked_bits_are_shifted_to_the_budget():
    groups = FlatGroups([spec(), spec(shape=(6, 5))], CPU, limits=[WidthLimits(2, 8), WidthLimits(1, 16)])
    asked = torch.cat([torch.linspace(-1, 1, 4), torch.tensor([-torch.inf, -1, 0, 0.5, 1, 9])])
    budget = groups.fixed_bits + 500
    found = sensitivity.bits_within(groups, asked, budget)
    payload = float(groups.values_T @ found)
    assert payload + float(groups.coding_bits(found.round())) == pytest.approx(500, abs=26)
    differences = (found - asked)[[0, 1, 2, 3, 5, 6, 7, 8]]
    assert float(differences.max() - differences.min()) < 1e-4
    assert found[4] == found[5]
    for constant in (-60, 60):
        torch.testing.assert_close(sensitivity.bits_within(groups, asked + constant, budget), found, rtol=1e-4, atol=1e-4)
    wide = sensitivity.bits_within(groups, torch.cat([torch.tensor([-50.0, 50, 0, 0]), torch.tensor([-50.0, 50, 0, 0, 0, 0])]), budget)
    torch.testing.assert_close(wide[[0, 1, 4, 5]], torch.tensor([2.05, 7.95, 1.05, 15.95]))
    assert sensitivity.bits_within(groups, torch.full((10,), -torch.inf), budget) is None


# --- whole widths


@pytest.mark.parametrize("room", [0, 7, 30, 71, 1000])
def test_room_is_filled_in_order_with_what_fits(room):
    generator = torch.Generator().manual_seed(room)
    width = torch.randint(2, 5, (12,), generator=generator).double()
    above = width + torch.randint(0, 3, (12,), generator=generator)
    values, order = torch.randint(1, 9, (12,), generator=generator).double(), torch.randperm(12, generator=generator)
    expected, left = width.clone(), room
    for all_before_fitted in (True, False):  # first as many as fit without a gap, then those of the others that still do
        for group in order.tolist():
            cost = float(values[group] * (above[group] - width[group]))
            if cost == 0 or expected[group] != width[group]:
                continue
            if cost <= left:
                expected[group], left = above[group], left - cost
            elif all_before_fitted:
                break
    assert torch.equal(fill_up(width, above, values, order, room), expected)


def test_the_nearest_width_that_is_allowed():
    assert nearest_widths(torch.tensor([1.0, 2.9, 3.1, 5.9, 6.1, 20.0]), (2, 4, 8)).tolist() == [2, 2, 4, 4, 8, 8]
    assert nearest_widths(torch.tensor([1.0]), (2, 4)).dtype == torch.int32


def test_widths_for_a_coded_size_are_sought_until_they_are_close():
    groups = FlatGroups([spec(shape=(100, 40))], CPU)
    asked = []

    def within(budget):
        asked.append(budget)
        width = (budget - groups.fixed_bits) // (100 * 41)
        return torch.full((100,), width, dtype=torch.int32)

    per_width = 100 * 41
    target = 4 * per_width + groups.fixed_bits
    found = allocate_coded_widths(groups, within, target, 0, lambda width: int(width[0]) * per_width // 3)
    assert asked[0] == target
    assert asked[1] == target + 4 * per_width // 3
    assert int(found[0]) == 5
    asked.clear()
    close = allocate_coded_widths(groups, within, target, per_width, lambda _: per_width)
    assert asked == [target + per_width], "met at once: nothing is sought"
    assert int(close[0]) == 5


# --- the code


def bytes_at_places(tensors):
    data = b"".join(each.contiguous().numpy().tobytes() for each in tensors)
    return [data[place::4] for place in range(4)]


def by_places(tensors):
    """Each of the four bytes with a model and a table of 4 bits for each different byte, or as it is."""
    return round(sum(min(code_length(each) + 4 * len(set(each)), 8 * len(each)) for each in bytes_at_places(tensors) if each))


def test_small_tensors_are_coded_large_ones_are_not():
    small, large = [torch.randn(300), torch.linspace(1, 2, 90), torch.ones(16)], torch.randn(2**14)
    assert coded_bits(small) == by_places(small)
    assert rest_in_file([*small, large]) == by_places(small) + 8 * 2**16 + 6400 + 28 * 4
    just_small = torch.ones(2**14 - 1)
    assert rest_in_file([just_small]) == by_places([just_small]) + 6400 + 28


GRIDS = [
    ("affine", "channel", "channel"),
    ("affine", 4, "channel"),
    ("half", 4, "channel"),
    ("half", "channel", "channel"),
    ("symmetric", 4, "channel"),
    ("float", "channel", "tensor"),
    ("affine", "tensor", 6),
]


def rounded(grid, group_size, range_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own = spec(shape=(6, 24), grid=grid, group_size=group_size, range_size=range_size)
    rows = torch.randn(6, 24, generator=generator)
    width = torch.randint(2, 5, own.bits_layout.shape, generator=generator, dtype=torch.int32)
    low, high = functional.grid_range(*own.range_layout.aminmax(rows), grid)
    return RoundedWeight(own, rows, width, functional.quant_params(low, high, width, grid))


def coded_symbols(weight, rows):
    """Width and level relative to the zero point of every weight."""
    own, layout = weight.spec, weight.spec.scale_layout
    levels = functional.quantize(rows, weight.params, weight.width, layout)
    width = own.bits_layout.expand(weight.width).expand(levels.shape).flatten().tolist()
    zero = weight.params.zero_point
    zero = [0] * len(width) if zero is None else layout.expand(zero.int()).expand(levels.shape).flatten().tolist()
    return [(b, (q - z) % 2**b) for b, q, z in zip(width, levels.flatten().tolist(), zero, strict=True)]


@pytest.mark.parametrize(("grid", "group_size", "range_size"), GRIDS)
def test_what_coding_saves(grid, group_size, range_size):
    weights = [rounded(grid, group_size, range_size, seed) for seed in (0, 1)]
    saved, levels, scales, widths = 0.0, 0.0, [], []
    for each in weights:
        own, found = each.spec, coded_symbols(each, each.rows)
        of_width = {b: [q for width, q in found if width == b] for b, _ in found}
        levels += max(0.0, sum(b * len(of_b) - code_length(of_b) for b, of_b in of_width.items()))
        flat = each.width.flatten().tolist()
        saved -= -len(flat) * math.ceil(math.log2(1 + max(flat) - min(flat)))
        widths += flat
        ranges = own.range_layout.num_groups
        if len(flat) > ranges and grid in ("affine", "half"):
            occurring = [set(row) for row in each.width.reshape(ranges, -1).tolist()]
            saved += 32 * ranges - sum(b + (grid == "half") for row in occurring for b in row)
        rows, columns = own.range_layout.shape
        extent = each.params.scale * (2.0**each.width - 1)
        scales += [part[:rows, :columns].float() for part in (extent, each.params.offset) if part is not None]
    saved -= code_length(widths)
    saved += max(0.0, levels - sum(96 + 16 * min(2**b, 16) for b in set(widths)))
    expected = saved + 32 * sum(each.numel() for each in scales) - by_places(scales)
    assert bits_saved(weights) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("grid", "group_size", "range_size"), GRIDS)
def test_a_level_is_chosen_by_its_error_and_its_code(grid, group_size, range_size):
    weight, price = rounded(grid, group_size, range_size), 0.4
    layout, rows, params = weight.spec.scale_layout, weight.rows, weight.params
    near = functional.quantize(rows, params, weight.width, layout)
    top = layout.expand((2**weight.width - 1).expand(params.scale.shape))
    tries = [torch.minimum((near + shift).clamp(min=0), top) for shift in (0, -1, 1)]
    values = [functional.dequantize(each, params, layout) for each in tries]
    errors = [((rows - each) / layout.expand(params.scale)).square() for each in values]
    ranges, chosen = weight.spec.range_layout, rows
    at_ends = sum(rows == ranges.expand(end) for end in ranges.aminmax(rows)) > 0
    assert at_ends.sum() >= 2 * ranges.num_groups
    for _ in range(3):  # the code is fitted to the nearest levels, then twice to those it chose
        found = coded_symbols(weight, chosen)
        most = 2 ** int(weight.width.max())  # as many places as the widest has levels
        counts, of_width = Counter(found), Counter(b for b, _ in found)
        costs = []
        for value, error in zip(values, errors, strict=True):
            length = [-math.log2((counts[each] + 0.5) / (of_width[each[0]] + 0.5 * most)) for each in coded_symbols(weight, value)]
            costs.append(error + price * torch.tensor(length).view_as(error))
        chosen = torch.stack(values).gather(0, torch.stack(costs).argmin(0, keepdim=True))[0]
        chosen = torch.where(at_ends, rows, chosen)  # the grid follows them
    torch.testing.assert_close(CodedLevels(weight, price).cheapest(weight).rows, chosen)


def test_the_expected_code_is_that_of_each_range():
    own = spec(shape=(3, 8), group_size=4, range_size="channel")
    weight, step = torch.randn(3, 8), torch.rand(3, 2) + 0.2
    weight[2] = 0.5  # all alike: no code
    rows = to_rows(weight, 0)
    expected = 0.0
    for row, steps in zip(rows[:2], step[:2], strict=True):
        spread = (row - row.mean()).abs().mean()
        for each in steps:
            levels = torch.arange(-500, 501).double()
            density = torch.distributions.Laplace(torch.tensor(0.0).double(), spread.double())
            share = density.cdf((levels + 0.5) * each) - density.cdf((levels - 0.5) * each)
            expected -= 4 * float(torch.special.xlogy(share, share).sum()) / math.log(2)
    weight.requires_grad_()
    found = expected_code_length([(own, weight, step)])
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert weight.grad[:2].any()
    assert not weight.grad[2].any()
