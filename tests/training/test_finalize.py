"""Frozen bits with true rounding at the end of a training, and batch norm statistics of the rounded weights."""

import copy

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, bits_report, convert_diffq, freeze_bits, model_size, prepare, prepare_diffq, reestimate_batch_norm
from diffq_fx.errors import PreparationError
from diffq_fx.kernels import extension
from diffq_fx.methods import STE
from diffq_fx.methods.grid import GridQuantizer

X, Y = torch.linspace(-1, 1, 64 * 24).view(64, 24).sin(), torch.linspace(0, 3, 64 * 8).view(64, 8).cos()


def make(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    return prepare_diffq(net, X[:2], DiffQConfig(**{"target_bits": 4.2, **settings}))


def train(model, steps, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
    return optimizer


def logits_of(model):
    return [quantizer.logits.detach().clone() for quantizer in model.compression.learned]


def widths_of(model):
    return [quantizer.width.clone() for quantizer in model.compression.learned]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_bits_freeze_after_the_noise_and_the_weights_train_on():
    model = make(training_steps=200)
    optimizer = train(model, 19)
    assert not model.compression.frozen
    assert not torch.equal(model.train()(X), model(X))  # noise
    train(model, 1, optimizer)
    assert model.compression.frozen
    logits, widths, weight = logits_of(model), widths_of(model), model.get_parameter("0.weight").detach().clone()
    train(model, 10, optimizer)
    assert same(logits, logits_of(model))  # though AdamW has momentum and decay for them
    assert same(widths, widths_of(model))
    assert not torch.equal(weight, model.get_parameter("0.weight"))
    assert torch.equal(model.train()(X), model.eval()(X))
    converted = convert_diffq(model)
    assert torch.equal(converted(X), model(X))
    budget = model.compression.budget_bits() + model.compression.rest_bits
    assert 0.97 * budget <= model_size(model, exact=True) * 8 * 2**20 <= budget


def test_the_gradient_goes_straight_through_and_the_bits_get_a_zero():
    model = make()
    freeze_bits(model)
    model.train()
    model(X).square().sum().backward()
    found = model.get_parameter("2.weight").grad
    assert all(not quantizer.logits.grad.any() for quantizer in model.compression.learned)
    plain = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            source = model.get_parameter(name)
            quantizer = next((q for q in model.compression.learned if q.spec.name == name), None)
            parameter.copy_(source if quantizer is None else quantizer.rounded_weight(source))
    plain(X).square().sum().backward()
    torch.testing.assert_close(found, plain[2].weight.grad)


@pytest.mark.parametrize("way", ["deepcopy", "state_dict"])
def test_a_copy_keeps_the_frozen_bits(way):
    model = make(training_steps=12)
    train(model, 10)
    twin = copy.deepcopy(model) if way == "deepcopy" else make(training_steps=12)
    if way == "state_dict":
        twin.load_state_dict(model.state_dict())
    assert twin.compression.frozen
    assert torch.equal(twin.train()(X), model.train()(X))
    assert same(widths_of(twin), widths_of(model))
    train(twin, 2)
    assert same(logits_of(twin), logits_of(model))


def test_another_target_counts_until_the_bits_are_final_and_then_the_report_says_so():
    model = make(training_steps=400, target_bits=5)
    train(model, 25)
    other = make(training_steps=400)
    other.load_state_dict(model.state_dict())
    assert bits_report(other).average_bits_in_all <= 4.2
    freeze_bits(model)
    assert bits_report(model).allocation == "learned"
    other.load_state_dict(model.state_dict())
    assert bits_report(other).average_bits_in_all > 4.2
    for found in (other, convert_diffq(other)):
        assert bits_report(found).allocation == "above the target: they were final in the state that was loaded, which had another one"


def test_without_a_plan_the_noise_goes_on_until_the_user_says_so():
    model = make()
    optimizer = train(model, 30)
    assert not model.compression.frozen
    freeze_bits(model)
    train(model, 2, optimizer)
    assert torch.equal(model.train()(X), model.eval()(X))


def test_compiles_with_frozen_bits():
    model = make()
    freeze_bits(model)
    compiled = torch.compile(copy.deepcopy(model).train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model.train()(X))
    compiled(X).sum().backward()


@pytest.mark.parametrize("settings", [{"training_steps": 0}, {"training_steps": 2.5}, {"training_steps": True}])
def test_impossible_phases_are_refused(settings):
    with pytest.raises(ValueError, match=rf"DiffQConfig: {next(iter(settings))} must be .*, got {next(iter(settings.values()))}"):
        DiffQConfig(**settings)


def test_freezing_needs_trainable_bits():
    with pytest.raises(PreparationError, match="freeze_bits: the Linear is not prepared"):
        freeze_bits(nn.Linear(4, 4))
    with pytest.raises(PreparationError, match="no weight of this model has trainable bits: it was prepared with STE"):
        freeze_bits(prepare(nn.Linear(24, 4), X[:2], STE(bits=4)))


@pytest.mark.parametrize("grid", ["affine", "half", "symmetric"])
@pytest.mark.parametrize(
    ("group_size", "range_per"), [("tensor", "tensor"), ("channel", "channel"), (8, "group"), (7, "channel"), (1, "tensor")]
)
def test_the_kernel_rounds_as_torch_does_bit_by_bit(monkeypatch, grid, group_size, range_per):
    if extension.kernels() is None:
        pytest.skip("the kernels are not built")
    torch.manual_seed(1)
    model = prepare_diffq(
        nn.Linear(300, 200),
        torch.zeros(1, 300),
        DiffQConfig(group_size=group_size, range_per=range_per, grid=grid, target_bits=None, penalty=1.0),
    )
    (quantizer,) = model.compression.quantizers
    assert isinstance(quantizer, GridQuantizer)
    quantizer.width.copy_(torch.randint(1, 9, quantizer.width.shape))
    weight = torch.randn(200, 300) * torch.logspace(-3, 3, 200).unsqueeze(1)
    weight[:, ::5] = (weight[:, ::5] * 4).round() / 4  # ties
    params = quantizer.params(weight, quantizer.rounded_bits())  # held: the sums behind a range are in another order in torch
    found = quantizer.round_to(weight, params)
    monkeypatch.setattr(extension, "kernels", lambda: None)
    assert torch.equal(found, quantizer.round_to(weight, params))
    assert found.unique().numel() > 3


def test_batch_norm_gathers_the_statistics_of_the_rounded_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
    model = prepare_diffq(net, X[:2], DiffQConfig(target_bits=4.2))
    with torch.no_grad():
        for _ in range(20):
            model.train()(X)
    reestimate_batch_norm(model, [X[:32], X[32:]])
    assert model.training
    quantizer = next(q for q in model.compression.quantizers if q.spec.name == "0.weight")
    rounded = nn.functional.linear(X, quantizer.rounded_weight(net[0].weight.detach()), net[0].bias.detach())
    torch.testing.assert_close(model.get_buffer("1.running_mean"), rounded.mean(0), rtol=1e-4, atol=1e-5)
    mean = model.get_buffer("1.running_mean").clone()
    with pytest.raises(ValueError, match="there is no batch"):
        reestimate_batch_norm(model, [])
    assert torch.equal(model.get_buffer("1.running_mean"), mean)
    assert model.get_submodule("1").momentum == 0.1


def test_a_short_training_has_the_targets_size_before_the_bits_freeze():
    model = make(training_steps=200)
    train(model, 1)
    assert not model.compression.frozen
    budget = model.compression.budget_bits() + model.compression.rest_bits
    assert model_size(model).item() * 8 * 2**20 == pytest.approx(budget, rel=0.02)
