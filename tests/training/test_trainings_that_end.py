"""Trainings that could not hold their size or their numbers are ended in a sentence: ZeRO's flat copies, steps inside backward, infinities."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffq_fx import DiffQConfig, DiffQError, DiffQWarning, DivergenceError, PreparationError, _compat, prepare_diffq, setup_optimizer
from diffq_fx.training import steps


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(steps, "_PATIENCE", 5)


def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return prepare_diffq(net, torch.randn(2, 8), DiffQConfig(target_bits=7))


def backward(model):
    x = torch.randn(8, 8)
    F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()


def test_flat_copies_are_refused():
    model = make()
    parameters = list(model.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    optimizer = torch.optim.Adam([flat], 1e-2)

    def step():
        backward(model)
        flat.grad = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        optimizer.step()
        parts = flat.detach().split([parameter.numel() for parameter in parameters])
        for parameter, values in zip(parameters, parts, strict=True):
            parameter.data.copy_(values.view_as(parameter))
            parameter.grad = None

    for _ in range(4):
        step()
    with pytest.raises(DiffQError, match=r"5 optimizer steps in a row held no parameter of a prepared model.*\n.*ZeRO"):
        step()
    assert optimizer.state[flat]["step"] == 4  # the refused step was not made


@pytest.mark.parametrize("names", [["2.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]])
def test_an_optimizer_without_the_bits_is_warned_of_once(names):
    model = make()
    optimizer = torch.optim.Adam([model.get_parameter(name) for name in names], 1e-2)

    def train():
        for _ in range(8):
            model(torch.randn(8, 8))  # a forward without a backward, such as one for a log
            backward(model)
            optimizer.step()

    with pytest.warns(DiffQWarning, match=r"5 optimizer steps in a row held none of the bits .* add the bits to yours") as found:
        train()
    assert [warning.filename for warning in found] == [__file__]
    setup_optimizer(optimizer, model)
    train()


def test_two_models_that_train_in_turns_are_not_refused():
    model, critic = make(), nn.Linear(4, 1)
    own, other = torch.optim.Adam(model.parameters(), 1e-2), torch.optim.Adam(critic.parameters(), 1e-2)
    for step in range(20):
        critic(model(torch.randn(8, 8))).mean().backward()
        (own if step % 4 == 0 else other).step()


@pytest.mark.parametrize("first", ["head", "weights"])
def test_the_optimizer_of_the_bits_may_be_the_second_to_step(first, recwarn):
    model, head = make(), nn.Linear(4, 1)
    bits = list(model.compression.logits)
    others = [each for each in model.parameters() if all(each is not own for own in bits)]
    groups = (head.parameters(), model.parameters()) if first == "head" else (others, bits)
    optimizers = [torch.optim.Adam(each, 1e-2) for each in groups]
    for _ in range(10):
        head(model(torch.randn(8, 8))).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not [each for each in recwarn if issubclass(each.category, DiffQWarning)]


def test_steps_between_which_the_model_does_not_train_count_as_none():
    model, critic = make(), nn.Linear(4, 1)
    other = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(10):
        with torch.no_grad():
            fake = model(torch.randn(8, 8))
        critic(fake).mean().backward()
        other.step()


def test_a_critic_may_train_for_long_on_what_a_model_in_training_puts_out():
    model, critic = make(), nn.Linear(4, 1)
    other = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(10):
        critic(model(torch.randn(8, 8)).detach()).mean().backward()
        other.step()
    for _ in range(4):
        critic(model(torch.randn(8, 8))).mean().backward()
        other.step()
    critic(model(torch.randn(8, 8))).mean().backward()
    with pytest.raises(DiffQError, match=r"call it under torch.no_grad\(\)"):
        other.step()


def test_a_step_inside_backward_is_refused_under_a_target():
    model = make()
    for parameter in model.parameters():
        own = torch.optim.SGD([parameter], 1e-2)
        parameter.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    with pytest.raises(DiffQError, match=r"an optimizer step inside backward\(\) .* cannot hold a size target"):
        backward(model)


def test_without_torchs_word_of_a_transform_training_goes_on(monkeypatch):
    monkeypatch.setattr(_compat, "_interpreter_stack", None)
    model = make()
    backward(model)
    torch.optim.SGD(model.parameters(), 1e-2).step()


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_ends_training_in_the_second_phase(number):
    model = prepare_diffq(nn.Linear(8, 16), torch.randn(2, 8), DiffQConfig(target_bits=7, training_steps=20))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)

    def step():
        optimizer.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        step()
    model.weight.data[0, 3] = number
    with pytest.raises(DivergenceError, match=r"optimizer step 5: weight 'weight' is not finite in 1 of 128 places, first at \(0, 3\)"):
        step()


def test_bits_that_are_not_finite_are_named_and_not_mended():
    model = make()
    backward(model)
    model.compression.learned[1].logits.data[3] = float("inf")
    with pytest.raises(DivergenceError, match=r"logits of weight '2.weight' is not finite in 1 of 4 places"):
        torch.optim.SGD(model.parameters(), 1e-2).step()


def test_a_weight_that_was_taken_away_is_named():
    model, other = make(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    backward(model)
    del model.get_submodule("2")._parameters["weight"]
    other(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()  # of nobody's concern
    with pytest.raises(PreparationError, match=r"weight '2.weight' is no longer where it was prepared"):
        optimizer.step()
