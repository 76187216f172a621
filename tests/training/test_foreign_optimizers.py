"""An optimizer over copies of the parameters (DeepSpeed's ZeRO) would leave the bits where they are: it is refused, others are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffq_fx import DiffQConfig, DiffQError, prepare_diffq
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


def test_an_optimizer_of_a_part_of_the_model_is_not_refused():
    model = make()
    optimizer = torch.optim.Adam([model.get_parameter("2.bias")], 1e-2)
    for _ in range(8):
        backward(model)
        optimizer.step()


def test_two_models_that_train_in_turns_are_not_refused():
    model, critic = make(), nn.Linear(4, 1)
    own, other = torch.optim.Adam(model.parameters(), 1e-2), torch.optim.Adam(critic.parameters(), 1e-2)
    for step in range(20):
        critic(model(torch.randn(8, 8))).mean().backward()
        (own if step % 4 == 0 else other).step()


def test_steps_between_which_the_model_does_not_train_count_as_none():
    model, critic = make(), nn.Linear(4, 1)
    other = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(10):
        with torch.no_grad():
            fake = model(torch.randn(8, 8))
        critic(fake).mean().backward()
        other.step()
