"""Weights made again in the backward: the same gradients, less memory, and an error where they cannot be made again."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffq_fx import DiffQConfig, DiffQError, freeze_bits, prepare, prepare_diffq, recompute_weights
from diffq_fx.kernels import extension
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization, QuantNoise


class Mixed(nn.Module):
    """A weight in two layers, a convolution, a recurrent layer and a weight too small to be made again."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(16, 128, 3, padding=1)
        self.first = nn.Linear(128, 128)
        self.second = nn.Linear(128, 128)
        self.second.weight = self.first.weight
        self.recurrent = nn.LSTM(128, 64, batch_first=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        rows = self.convolution(x).flatten(2).transpose(1, 2)
        return self.head(self.recurrent(self.second(self.first(rows).tanh()))[0])


X = torch.linspace(-1, 1, 2 * 16 * 3 * 3).view(2, 16, 3, 3).sin()
DIFFQ = {"target_bits": 3}
METHODS = {
    "noise": DiffQConfig(**DIFFQ),
    "noise of groups": DiffQConfig(group_size=8, **DIFFQ),
    "Gaussian noise, whole ranges": DiffQConfig(noise="gaussian", range_per="tensor", clip_ranges=False, **DIFFQ),
    "LSQ": LSQ(bits=3),
    "STE": STE(bits=3),
    "Quant-Noise": QuantNoise(bits=3, rate=0.5),
    "Quant-Noise, held ranges": QuantNoise(bits=3, rate=0.5, range="least_error"),
    "exact noise of a codebook": ProductQuantization(entries=16, update_every=2),
    "mean noise of a codebook": ProductQuantization(entries=16, noise="mean"),
    "a codebook without noise": ProductQuantization(entries=16, rate=0),
    "LC": LC(entries=4),
}


def make(method, seed=0):
    torch.manual_seed(seed)
    return prepare(Mixed(), X, method).train()


def gradients(model, context=None, backwards=1):
    torch.manual_seed(7)
    model.zero_grad()
    if context is None:
        loss = model(X).square().sum()
    else:
        with context:
            loss = model(X).square().sum()
    after = torch.rand(1)  # the backward draws nothing from the generator that the user sees
    for left in reversed(range(backwards)):
        loss.backward(retain_graph=left > 0)
    assert context is None or not torch.equal(torch.rand(1), after)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("kernels", ["C", "torch"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradients_are_the_same_to_the_last_bit(method, kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(extension, "kernels", lambda: None)
    model = make(method)
    assert_same(gradients(copy.deepcopy(model), recompute_weights()), gradients(model))


def test_gradients_are_the_same_with_final_bits():
    model = make(METHODS["noise"])
    freeze_bits(model)
    assert_same(gradients(copy.deepcopy(model), recompute_weights()), gradients(model))


def plainly(model):
    return model(X)


def kept_elsewhere(model):
    with torch.autograd.graph.save_on_cpu():
        return model(X)


def in_half(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(X).float()


def checkpointed(model, reentrant=False, inside=plainly):
    x = torch.ones(1, requires_grad=True)
    return checkpoint(lambda x: inside(model) * x, x, use_reentrant=reentrant)


def made_again(model):
    with recompute_weights():
        return model(X)


def compiled(model):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        return torch.compile(model, fullgraph=True, backend="aot_eager")(X)


TOGETHER = {
    "checkpointing": (checkpointed, plainly),
    "reentrant checkpointing": (lambda model: checkpointed(model, reentrant=True), plainly),
    "within checkpointing": (lambda model: checkpointed(model, inside=made_again), plainly),
    "within reentrant checkpointing": (lambda model: checkpointed(model, reentrant=True, inside=made_again), plainly),
    "autocast": (in_half, in_half),
    "checkpointing and autocast": (lambda model: checkpointed(model, inside=in_half), in_half),
    "save_on_cpu": (kept_elsewhere, plainly),
    "compile": (compiled, compiled),
}


@pytest.mark.parametrize("kernels", ["C", "torch"])
@pytest.mark.parametrize("final", [False, True], ids=["noise", "rounding"])
@pytest.mark.parametrize(
    ("run", "reference"), [pytest.param(*pair, id=name, marks=[pytest.mark.slow] * (name == "compile")) for name, pair in TOGETHER.items()]
)
def test_with_what_else_keeps_less(run, reference, final, kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(extension, "kernels", lambda: None)
    model = make(METHODS["noise"])
    if final:
        freeze_bits(model)
    found = [gradients_of(run, copy.deepcopy(model), within) for within in (False, True)]
    expected = gradients_of(reference, model)
    for each in found:
        assert each.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(each[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def gradients_of(run, model, within=None):
    torch.manual_seed(7)
    if within is None:
        run(model).square().sum().backward()
    else:
        with recompute_weights():
            loss = run(model).square().sum()
            if within:
                loss.backward()
        if not within:
            loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_accumulation_with_backwards_in_another_order():
    model = make(METHODS["noise"])

    def accumulated(model, context):
        torch.manual_seed(7)
        losses = []
        for _ in range(3):
            with context():
                losses.append(model(X).square().sum())
        for loss in reversed(losses):
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert_same(accumulated(copy.deepcopy(model), recompute_weights), accumulated(model, contextlib.nullcontext))


def test_a_backward_may_come_twice():
    model = make(METHODS["noise"])
    assert_same(gradients(copy.deepcopy(model), recompute_weights(), backwards=2), gradients(model, backwards=2))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_training_takes_the_same_course(method):
    plain, again = make(method), make(method)
    for model, remake in ((plain, False), (again, True)):
        torch.manual_seed(3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(30):  # past the step at which the bits move
            optimizer.zero_grad()
            if remake:
                with recompute_weights():
                    model(X).square().mean().backward()  # the backward within the context
            else:
                model(X).square().mean().backward()
            optimizer.step()
    for (name, one), other in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_weight_is_made_again_once_in_a_backward():
    model = make(METHODS["noise"])
    freeze_bits(model)
    quantizer = next(q for q in model.compression.quantizers if q.spec.name == "first.weight")  # two layers and its own backward need it
    calls, training_weight = [], quantizer.training_weight
    quantizer.training_weight = lambda weight: (calls.append(1), training_weight(weight))[1]
    gradients(model, recompute_weights())
    assert len(calls) == 2  # one forward, one backward


def kept_bytes(model, monkeypatch):
    """Bytes that autograd holds after a forward and that are no parameters."""
    kept, pack = {}, recompute_weights._pack

    def noting(self, tensor):
        saved = pack(self, tensor)
        kept[id(saved)] = saved
        return saved

    monkeypatch.setattr(recompute_weights, "_pack", noting)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with recompute_weights():
        model(X)
    tensors = [saved.source.untyped_storage() for saved in kept.values() if isinstance(saved.source, torch.Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in tensors if each.data_ptr() not in own}.values())


@pytest.mark.parametrize("final", [False, True], ids=["noise", "rounding"])
def test_no_weight_is_kept(final, monkeypatch):
    torch.manual_seed(0)
    model = prepare_diffq(nn.Sequential(nn.Conv2d(16, 512, 3), nn.Flatten(), nn.Linear(512, 1024)), X, DiffQConfig(**DIFFQ)).train()
    if final:
        freeze_bits(model)
    weights = 16 * 512 * 9 + 512 * 1024
    activations = 4 * 2 * (16 * 9 + 512 + 1024)
    assert kept_bytes(model, monkeypatch) < 0.1 * weights + activations


def test_a_weight_that_changed_since_the_forward_is_named():
    model = make(METHODS["noise"])
    with recompute_weights():
        loss = model(X).square().sum()
    with torch.no_grad():
        model.get_parameter("first.weight").mul_(2)
    with pytest.raises(DiffQError, match=r"weight 'first.weight' or its bits were changed between forward and backward"):
        loss.backward()


def test_bits_that_changed_since_the_forward_are_named():
    model = make(METHODS["noise"])
    with recompute_weights():
        loss = model(X).square().sum()
    quantizer = next(q for q in model.compression.quantizers if q.spec.name == "convolution.weight")
    with torch.no_grad():
        quantizer.logits.add_(1)
    with pytest.raises(DiffQError, match=r"convolution.weight"):
        loss.backward()


def test_another_tensor_that_changed_is_an_error_as_without():
    x = torch.ones(3, requires_grad=True)
    with recompute_weights():
        y = x * 2
        out = y * y
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_weight_that_its_layer_changes_in_place_is_kept(monkeypatch):
    monkeypatch.setattr(extension, "kernels", lambda: None)  # what the kernel gives out cannot be changed
    model = make(METHODS["noise"])
    quantizer = next(q for q in model.compression.quantizers if q.spec.name == "first.weight")
    weight = model.get_parameter("first.weight")

    def run():
        torch.manual_seed(1)
        noisy = quantizer(weight)
        noisy.mul_(2)
        x = torch.ones(2, 128, requires_grad=True)  # its gradient is what needs the changed weight
        return torch.autograd.grad((x @ noisy).sin().sum(), [x, weight, quantizer.logits])

    expected = run()
    with recompute_weights():
        found = run()
    assert all(map(torch.equal, found, expected))


def test_tensors_without_memory_of_their_own_are_kept():
    model = make(METHODS["noise"])
    rows = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged, requires_grad=True)
    with recompute_weights():
        noisy = model.compression.quantizers[0](model.get_parameter("convolution.weight"))  # alive while the other is saved
        loss = noisy.sum() + (rows * rows).values().sum()
    loss.backward()
    assert bool((rows.grad.values() == 2).all())


def test_hooks_inside_it_are_called():
    model = make(METHODS["noise"])
    seen = []
    with recompute_weights(), torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t)[1], lambda t: t):
        loss = model(X).sum()
    loss.backward()
    assert seen


def test_it_ends_with_its_block():
    model = make(METHODS["noise"])
    with pytest.raises(ZeroDivisionError), recompute_weights():
        _ = 1 / 0
    with recompute_weights():
        pass
    assert_same(gradients(model), gradients(make(METHODS["noise"])))
