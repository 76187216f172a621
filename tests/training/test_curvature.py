"""The curvature of each group as the first steps measure it, the widths of the least loss, and the guard against the same bits for all."""

import copy

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, bits_report, convert_diffq, freeze_bits, prepare_diffq
from diffq_fx.budget import sensitivity
from diffq_fx.methods import diffq_settings
from diffq_fx.methods.predicted_loss import squared_errors, surely_less

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
