"""The curvature of each group as the first steps measure it, the widths of the least loss, and the guard against the same bits for all."""

import copy

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, bits_report, convert_diffq, freeze_bits, prepare_diffq
from diffq_fx.budget import sensitivity
from diffq_fx.budget.flat_groups import FlatGroups, WidthLimits
from diffq_fx.budget.least_loss import least_loss_widths, squared_errors, surely_less
from diffq_fx.budget.size import exact_bits
from diffq_fx.methods import diffq_settings, predicted_loss
from diffq_fx.weights import WeightSpec

LOUD = torch.logspace(0, -3, 16).view(16, 1)


def measured(*, steps=40, scale=1.0, **settings):
    """A loss that is quadratic in the weights, so that the curvature of each is known: ``scale * LOUD / 2`` for every weight of a row."""
    torch.manual_seed(0)
    model = prepare_diffq(nn.Linear(256, 16, bias=False), torch.zeros(1, 256), DiffQConfig(**{"target_bits": 4, **settings}))
    float_weight = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    for _ in range(steps):
        optimizer.zero_grad()
        noisy = model(torch.eye(256)).T
        (scale * (LOUD * (noisy - float_weight).square()).sum() / 2).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("settings", [{}, {"noise": "gaussian"}, {"group_size": 32}, {"clip_ranges": False}, {"group_size": "tensor"}])
def test_the_measured_curvature_is_that_of_a_quadratic_loss(monkeypatch, settings):
    monkeypatch.setattr(diffq_settings, "SENSITIVITY_STEPS", 40)
    (quantizer,) = measured(**settings).compression.learned
    found = sensitivity.measured_curvature(quantizer.gradient_sums)[0] / 40
    if settings.get("group_size") == "tensor":
        squares = quantizer.spec.range_layout.sum(quantizer.weight.detach().square())
        expected = ((LOUD * squares).sum() / squares.sum()).view(1, 1)
    else:
        expected = LOUD.expand_as(found)
    assert torch.allclose(found, expected, rtol=0.15)


def test_the_curvature_of_groups_is_spread_by_their_gradients_at_the_level_that_was_measured():
    (quantizer,) = measured(target_bits=3).compression.learned
    _, _, curvature, noise = quantizer.gradient_sums.flatten(1)
    found = sensitivity.curvatures([quantizer.spec], [quantizer.gradient_sums])
    assert float(found.min()) > 0
    assert torch.equal(found.argsort(descending=True)[:6], torch.arange(6))
    assert float(torch.dot(found, noise)) == pytest.approx(float(torch.dot(curvature, noise)), rel=0.1)


def test_a_curvature_that_was_not_measured_is_that_of_the_gradients():
    spec = WeightSpec(name="w", shape=(2, 8), axis=0)
    sums = torch.tensor([[4.0, 1.0], [1e9, 1e9], [-1.0, -2.0], [1.0, 1.0]]).view(4, 2, 1)
    assert torch.allclose(sensitivity.curvatures([spec], [sums]), torch.tensor([4.0, 1.0]))


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


@pytest.mark.parametrize(
    "settings", [{}, {"group_size": 32}, {"group_size": "tensor"}, {"range_per": "tensor"}, {"size_of": "packed_file"}]
)
def test_squared_errors_are_those_of_the_rounded_weight(settings):
    model = prepare_diffq(nn.Linear(100, 300), torch.zeros(1, 100), DiffQConfig(target_bits=3, **settings)).eval()
    model(torch.zeros(1, 100))
    (quantizer,) = model.compression.learned
    errors = (quantizer(quantizer.weight) - quantizer.weight).detach().square()
    found = squared_errors(quantizer.rounded_at(quantizer.width))
    assert found.shape == quantizer.width.shape
    assert torch.allclose(found, quantizer.spec.bits_layout.sum(errors), rtol=1e-4)


def with_bits(order, *, steps=20, **settings):
    """A model whose loud rows have the most bits, or the fewest, as training left them."""
    model = measured(steps=steps, target_bits=3, **settings)
    (logits,) = model.compression.logits
    with torch.no_grad():
        logits.copy_(order * torch.linspace(0.1, -0.2, 16).view(16, 1))
    freeze_bits(model)
    return model


@pytest.mark.parametrize("size_of", ["widths", "packed_file"])
def test_bits_that_are_worse_than_uniform_ones_do_not_become_final(size_of):
    model = with_bits(-1, size_of=size_of)
    widths = model.compression.width_T()
    assert float(widths.max() - widths.min()) <= 1
    assert model.compression.exact_bits() <= (model.compression.budget_bits(measured=True) + model.compression.rest_bits_now())
    for each in (model, copy.deepcopy(model), convert_diffq(model)):
        assert "the same in all groups" in bits_report(each).allocation
    assert "widths: the same in all groups" in str(bits_report(model))
    other = measured(steps=1, target_bits=3, size_of=size_of)
    assert bits_report(other).allocation == ""
    other.load_state_dict(model.state_dict())
    assert "the same in all groups" in bits_report(other).allocation
    assert torch.equal(other.compression.width_T(), widths)


def test_bits_that_are_better_than_uniform_ones_become_final():
    model = with_bits(1)
    widths = model.compression.width_T()
    assert float(widths[:4].min()) > float(widths[-4:].max())
    assert bits_report(model).allocation.startswith("learned")
    assert bits_report(convert_diffq(model)).allocation.startswith("learned")


@pytest.mark.parametrize("settings", [{}, {"size_of": "packed_file"}, {"size_of": "onnx_file"}, {"widths": (2, 3, 8)}, {"group_size": 64}])
def test_widths_of_the_least_loss_hold_the_size_and_cost_less(settings):
    model = measured(steps=20, target_bits=4, **settings)
    learned = copy.deepcopy(model)
    learned.compression.freeze()
    model.compression.freeze(least_loss=True)
    costs = []
    for each in (model.compression, learned.compression):
        of_width = predicted_loss.costs(each.learned, each.groups())
        costs.append(sum(float(of_width[int(width)][i]) for i, width in enumerate(each.width_T())))
        assert each.exact_bits() <= each.budget_bits(measured=True) + each.rest_bits_now()
    assert costs[0] <= costs[1]
    assert set(model.compression.width_T().tolist()) <= set(model.compression.config.limits.widths)


def test_a_difference_within_the_noise_of_the_measurement_changes_nothing():
    curvature, ones = torch.tensor([1.0, 1.5]), torch.ones(2)
    better, worse = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])
    assert surely_less(curvature, 0.01 * ones, better, worse)
    assert not surely_less(curvature, ones, better, worse)
    assert not surely_less(curvature, 0.01 * ones, worse, better)


@pytest.mark.parametrize("steps", [0, 5])
def test_before_the_curvature_is_measured_the_learned_bits_stay(steps):
    model = with_bits(-1, steps=steps)
    assert float(model.compression.width_T()[0]) < float(model.compression.width_T()[-1])
    assert bits_report(model).allocation == "learned"
    other = measured(steps=steps, target_bits=3)
    other.compression.freeze(least_loss=True)
    assert other.compression.width_T().unique().tolist() == [2, 3]
