"""Bits that move, after a few steps, to where the gradients of the weights want them."""

import copy

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, model_size, prepare_diffq
from diffq_fx.methods import diffq_settings
from diffq_fx.methods.predicted_loss import is_measured

X = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _the_bits_move_after_the_fifth_step(monkeypatch):
    monkeypatch.setattr(diffq_settings, "SENSITIVITY_STEPS", 5)


class TwoHeads(nn.Module):
    """Two layers of the same weights, of which one counts a hundred times as much, and one that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.loud, self.quiet, self.unused = (nn.Linear(32, 64, bias=False) for _ in range(3))
        with torch.no_grad():
            self.quiet.weight.copy_(self.loud.weight)

    def forward(self, x):
        return self.loud(x), self.quiet(x), self.unused(x)


def trained(steps, *, scale=1.0, target_bits=5, **settings):
    torch.manual_seed(0)
    net = TwoHeads()
    model = prepare_diffq(net, X[:2], DiffQConfig(**{"target_bits": target_bits, "training_steps": 10**6, **settings}))
    goal = copy.deepcopy(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    for _ in range(steps):
        optimizer.zero_grad()
        (loud, quiet, unused), (a, b, _) = model(X), goal(X)
        (scale * ((loud - a).square().mean() + 1e-2 * (quiet - b).square().mean()) + 0 * unused.sum()).backward()
        optimizer.step()
    return model


def bits_of(model, name):
    return next(q for q in model.compression.learned if q.spec.name == name).bits().detach()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("target", [3.5, 5])
def test_every_group_gets_the_bits_that_its_curvature_asks_for(scale, target):
    # The same range and 1e-2 times the curvature: the least loss at a size has log2(1e-2) / 2 = -3.32 bits.
    model = trained(5, scale=scale, target_bits=target)
    loud, quiet = bits_of(model, "loud.weight"), bits_of(model, "quiet.weight")
    assert float(loud.mean() - quiet.mean()) == pytest.approx(3.32, abs=0.15)
    assert float(loud.std()) < 0.3, "the channels of one layer count as much as each other"
    assert float(bits_of(model, "unused.weight").max()) < float(quiet.min()) + 0.1
    assert model_size(model).item() * 2**23 == pytest.approx(model.compression.budget_bits() + model.compression.rest_bits, rel=0.01)


@pytest.mark.parametrize("training_steps", [1, 3, 40])
def test_the_bits_move_before_they_are_final_however_short_the_training(training_steps):
    model = trained(max(training_steps // 10, 1), training_steps=training_steps, target_bits=3.5)
    assert model.compression.frozen
    assert float(bits_of(model, "loud.weight").mean()) > float(bits_of(model, "quiet.weight").mean()) + 2.5


def test_a_curvature_is_measured_once_the_bits_have_moved():
    assert not is_measured(trained(4).compression.learned)
    assert is_measured(trained(5).compression.learned)


def test_before_that_all_groups_have_the_bits_that_meet_the_target():
    model = trained(4)
    bits = torch.cat([q.bits().detach().flatten() for q in model.compression.learned])
    assert float(bits.max() - bits.min()) < 1e-3
    assert model_size(model).item() * 2**23 == pytest.approx(model.compression.budget_bits() + model.compression.rest_bits, rel=0.01)


def test_a_row_with_hardly_a_gradient_yet_is_not_worthless():
    torch.manual_seed(0)
    table = nn.Embedding(64, 32)
    model = prepare_diffq(table, torch.zeros(2, dtype=torch.long), DiffQConfig(target_bits=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    heard = torch.cat([torch.ones(32), torch.full((16,), 1e-8), torch.zeros(16)]).view(64, 1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.arange(64)).square() * heard).sum().backward()
        optimizer.step()
    (quantizer,) = model.compression.learned
    bits = quantizer.bits().detach().flatten()
    assert 0.5 < float(bits[:32].mean() - bits[32:48].mean()) < 3
    assert 0.1 < float(bits[:32].mean() - bits[48:].mean()) < 0.5, "nothing is known of rows without any gradient but their weight's mean"


def test_more_steps_with_a_gradient_leave_less_doubt(monkeypatch):
    differences = []
    for steps in (2, 20):
        torch.manual_seed(0)
        monkeypatch.setattr(diffq_settings, "SENSITIVITY_STEPS", steps)
        model = prepare_diffq(nn.Embedding(64, 32), torch.zeros(2, dtype=torch.long), DiffQConfig(target_bits=5))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        loud = torch.cat([torch.ones(32), torch.full((32,), 1e-3)]).view(64, 1)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(torch.arange(64)).square() * loud).sum().backward()
            optimizer.step()
        bits = model.compression.learned[0].bits().detach().flatten()
        differences.append(float(bits[:32].mean() - bits[32:].mean()))
    assert 0.25 < differences[0] < 0.6 < differences[1]


@pytest.mark.parametrize("range_per", ["tensor", "channel", "group"])
@pytest.mark.parametrize("group_size", ["tensor", "channel", 16])
def test_bits_move_whatever_shares_a_width_and_a_range(group_size, range_per):
    model = trained(30, group_size=group_size, range_per=range_per, max_bits=12)
    assert float(bits_of(model, "loud.weight").min()) > float(bits_of(model, "quiet.weight").max()) + 2
    assert model_size(model, exact=True) <= (model.compression.budget_bits() + model.compression.rest_bits) / 2**23
