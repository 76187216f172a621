"""The rule that the curvature benchmark compares with that of training."""

import pytest
import torch

from benchmarks._least_loss import curvatures, least_loss_widths
from diffq_fx.budget.flat_groups import FlatGroups, WidthLimits
from diffq_fx.budget.size import exact_bits
from diffq_fx.weights import WeightSpec


def test_a_curvature_that_was_not_measured_is_that_of_the_gradients():
    spec = WeightSpec(name="w", shape=(2, 8), axis=0)
    sums = torch.tensor([[4.0, 1.0], [1e9, 1e9], [-1.0, -2.0], [1.0, 1.0]]).view(4, 2, 1)
    assert torch.allclose(curvatures([spec], [sums]), torch.tensor([4.0, 1.0]))


def groups_of(*shapes, widths=tuple(range(1, 9))):
    specs = [WeightSpec(name=f"w{i}", shape=shape, axis=0) for i, shape in enumerate(shapes)]
    return FlatGroups(specs, torch.device("cpu"), limits=[WidthLimits(widths[0], widths[-1], widths)] * len(specs))


def losses_of(groups, curvature_T, widths):
    return {width: curvature_T * 4.0**-width for width in widths}


@pytest.mark.parametrize("widths", [tuple(range(1, 9)), (2, 4, 8)])
@pytest.mark.parametrize("bits", [2.5, 3.0, 4.7])
def test_no_other_widths_of_the_size_lose_less(widths, bits):
    generator = torch.Generator().manual_seed(3)
    groups = groups_of((40, 64), (8, 16), widths=widths)
    curvature_T = 10 ** (4 * torch.rand(groups.num_groups, generator=generator))
    losses = losses_of(groups, curvature_T, widths)
    budget = int(bits * groups.num_weights) + groups.fixed_bits + 200
    width_T = least_loss_widths(groups, losses, budget)

    def loss(widths_T):
        return sum(float(losses[int(width)][i]) for i, width in enumerate(widths_T))

    size = exact_bits(groups, width_T)
    assert 0 <= budget - size < max(65 * 2, 0.02 * budget)
    assert set(width_T.tolist()) <= set(widths)
    for _ in range(300):  # neighbours of the same size or smaller
        up, down = torch.randint(groups.num_groups, (2,), generator=generator).tolist()
        other = width_T.clone()
        places = [widths.index(int(other[each])) for each in (up, down)]
        if up != down and places[0] + 1 < len(widths) and places[1] > 0:
            other[up], other[down] = widths[places[0] + 1], widths[places[1] - 1]
            assert exact_bits(groups, other) > budget or loss(other) >= loss(width_T) * (1 - 1e-2)


def test_groups_that_lose_the_same_share_what_is_left():
    groups = groups_of((40, 64))
    budget = groups.fixed_bits + 40 * 65 * 3 + 40 + 10 * 65
    width_T = least_loss_widths(groups, losses_of(groups, torch.ones(40), range(1, 9)), budget)
    assert torch.bincount(width_T).tolist() == [0, 0, 0, 30, 10]


def test_a_budget_out_of_reach_has_the_narrowest_widths():
    groups = groups_of((4, 64))
    assert least_loss_widths(groups, losses_of(groups, torch.ones(4), range(1, 9)), 10).tolist() == [1] * 4
