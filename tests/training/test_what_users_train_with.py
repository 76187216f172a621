"""Autocast, checkpointing, offload, moving averages, seeds; and the same training as the formulas written out."""

import copy
import statistics

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from diffq_fx import DiffQConfig, DiffQError, convert_diffq, model_size, prepare_diffq
from diffq_fx.budget.bit_state import GAIN
from diffq_fx.kernels import extension


def make(scope="auto", **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    return prepare_diffq(model, torch.zeros(2, 64), DiffQConfig(**{"target_bits": None, "penalty": 1.0, **settings}), scope=scope)


def digits():
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def gradients(model, run):
    model.zero_grad()
    torch.manual_seed(7)
    run(model).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


X = torch.linspace(-1, 1, 5 * 64).view(5, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_weights_and_bits_in_float32(dtype):
    model = make()
    with torch.autocast("cpu", dtype=dtype):
        out = model(X)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert bool(parameter.grad.any()) == (not name.endswith("clip")), name  # ranges wait for the bits to be final
    exact = gradients(make(), lambda m: m(X))["2.weight"]
    with torch.autocast("cpu", dtype=dtype):
        found = gradients(make(), lambda m: m(X).float())["2.weight"]
    assert F.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_noise(reentrant):
    plain = gradients(make(), lambda m: m(X))
    x = X.clone().requires_grad_()
    again = gradients(make(), lambda m: checkpoint(m, x, use_reentrant=reentrant))
    other_noise = gradients(make(), lambda m: (m(X), m(X))[1])
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    assert not torch.allclose(other_noise["0.weight"], plain["0.weight"])


def test_activations_kept_elsewhere_give_the_same_gradients():
    plain = gradients(make(), lambda m: m(X))
    with torch.autograd.graph.save_on_cpu():
        offloaded = gradients(make(), lambda m: m(X))
    for name, gradient in plain.items():
        assert torch.equal(offloaded[name], gradient), name


def train(model, steps=40, seed=3, ema=None):
    torch.manual_seed(seed)
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        pick = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[pick]), y[pick])
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update_parameters(model)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("group_size", ["channel", 8])
def test_a_seed_repeats_a_training_bit_by_bit(group_size):
    first, second = make(target_bits=4, penalty=None, group_size=group_size), make(target_bits=4, penalty=None, group_size=group_size)
    assert train(first) == train(second)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_moving_average_converts_at_its_own_bits():
    model = make(target_bits=4, penalty=None, training_steps=10**6)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, steps=150, ema=ema)
    averaged = ema.module
    assert not torch.equal(averaged.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert model_size(averaged, exact=True) <= (4 * (64 * 48 + 480) + 32 * 58) / 8 / 2**20
    converted = convert_diffq(averaged)
    x, y = digits()
    with torch.no_grad():
        assert (converted(x).argmax(1) == y).float().mean() > 0.85
        torch.testing.assert_close(converted(x), averaged.eval()(x))


class FormulasWrittenOut(nn.Module):
    """Linear layers with ``w + step(b) (u - 1/2)``, the bits trained by autograd through every operation."""

    def __init__(self, model, config):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model if isinstance(layer, nn.Linear))
        share = (config.init_bits - config.min_bits) / (config.max_bits - config.min_bits)
        start = torch.logit(torch.tensor(share)) / GAIN
        self.logits = nn.ParameterList(torch.full((layer.out_features, 1), start.item()) for layer in self.layers)
        self.config = config

    def forward(self, x):
        for i, (layer, logits) in enumerate(zip(self.layers, self.logits, strict=True)):
            bits = self.config.min_bits + torch.sigmoid(GAIN * logits) * (self.config.max_bits - self.config.min_bits)
            low, high = layer.weight.detach().amin(1, True).clamp(max=0), layer.weight.detach().amax(1, True).clamp(min=0)
            noisy = layer.weight + (high - low) / (2**bits - 1) * (torch.rand_like(layer.weight) - 0.5)
            x = F.linear(x, noisy, layer.bias)
            x = x if i else x.relu()
        return x


@pytest.mark.slow
def test_the_loss_falls_as_with_the_formulas_written_out():
    """Few bits, so that the noise matters: the curves of several seeds agree, and without noise they would not."""
    config = DiffQConfig(target_bits=None, min_bits=1, init_bits=1.4, max_bits=3, clip_ranges=False)
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def late_losses(make_model):
        return [statistics.mean(train(make_model(), steps=120, seed=seed)[-40:]) for seed in range(6)]

    ours = late_losses(lambda: prepare_diffq(copy.deepcopy(float_model), torch.zeros(2, 64), config))
    reference = late_losses(lambda: FormulasWrittenOut(float_model, config))
    plain = late_losses(lambda: copy.deepcopy(float_model))
    spread = 3 * (statistics.stdev(ours) + statistics.stdev(reference)) / len(ours) ** 0.5
    assert abs(statistics.mean(ours) - statistics.mean(reference)) < spread
    assert statistics.mean(plain) < statistics.mean(reference) - spread


@pytest.mark.parametrize("kernels", ["C", "torch"])
def test_second_derivatives_are_those_of_the_weights_and_an_error_for_the_bits(kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(extension, "kernels", lambda: None)
    model = make()

    def first(names):
        torch.manual_seed(7)
        loss = (model(X).tanh() ** 3).sum()
        return torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names], create_graph=True)

    weight, bits = "0.weight", next(name for name, _ in model.named_parameters() if name.endswith("logits"))
    (gradient,) = first([weight])
    (second,) = torch.autograd.grad(gradient.square().sum(), model.get_parameter(weight))  # differentiated twice is the weight alone
    torch.manual_seed(7)
    noisy = [q(model.get_parameter(q.spec.name)).detach().requires_grad_() for q in model.compression.quantizers]
    hidden = F.relu(F.linear(X, noisy[0], model.get_parameter("0.bias")))
    loss = (F.linear(hidden, noisy[1], model.get_parameter("2.bias")).tanh() ** 3).sum()
    (expected,) = torch.autograd.grad(loss, noisy[0], create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), noisy[0])[0])
    both = first([weight, bits])
    with pytest.raises(DiffQError, match="second derivative through the bits"):
        both[1].square().sum().backward()
