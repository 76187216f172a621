"""What a forward does beside computing values: a graph would lose it, so it is kept, by module scope or as a leaf, with the reason said."""

import contextlib
import re
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffq_fx import CaptureError, DiffQConfig, prepare_diffq
from diffq_fx.capture import gate, trace

CONFIG = DiffQConfig(penalty=1.0)
X = torch.randn(8, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.between(self.body(x)))

    def between(self, x):
        return x


class Reverse(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, grad: -grad)


class Sign(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.sign())
    backward = staticmethod(lambda ctx, grad: grad)


class Frozen(Net):
    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


class FrozenByDecorator(Net):
    body_of = torch.set_grad_enabled(False)(lambda self, x: self.body(x))

    def forward(self, x):
        return self.head(self.body_of(x))


class FrozenInInference(Net):
    def forward(self, x):
        with torch.inference_mode():
            x = self.body(x)
        return self.head(x.clone())


class Dann(Net):
    def between(self, x):
        return Reverse.apply(x)


class Binary(Net):
    def between(self, x):
        return Sign.apply(x)


class BinaryWeights(nn.Module):
    """The straight-through sign is on the weight itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(F.linear(x, Sign.apply(self.body.weight), self.body.bias))


class InFloat32(Net):
    def between(self, x):
        with torch.autocast("cpu", enabled=False):
            return x.float() @ x.float().T @ x.float()


class Offloads(Net):
    def between(self, x):
        with torch.autograd.graph.save_on_cpu():
            return x.sin()


LOSE = {
    Frozen: "switches gradients",
    FrozenByDecorator: "switches gradients",
    FrozenInInference: "switches gradients",
    Dann: "autograd.Function Reverse",
    Binary: "autograd.Function Sign",
    BinaryWeights: "autograd.Function Sign",
    InFloat32: "a region of autocast",
    Offloads: "hooks on saved tensors",
}


def gradients(model):
    model.zero_grad()
    with contextlib.ExitStack() as stack:
        for quantizer in model.compression.quantizers if hasattr(model, "compression") else ():
            weight = model.get_parameter(quantizer.spec.name)
            quantizer.pass_through(lambda weight=weight: weight)
            stack.callback(quantizer.pass_through, None)
        model.train()(X).pow(2).mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if not name.endswith("logits")}


@pytest.mark.parametrize("model_class", LOSE)
def test_module_scope_is_taken_and_gradients_are_the_originals(model_class):
    original = model_class()
    wanted = gradients(original)
    model = prepare_diffq(original, X, CONFIG)
    assert model.compression.scope == "module"
    assert re.search(LOSE[model_class], model.compression.scope_reason)
    found = gradients(model)
    assert found.keys() >= wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(found[name], gradient), name
    with pytest.raises(CaptureError, match=LOSE[model_class]):
        prepare_diffq(original, X, CONFIG, scope="model")


def caught(self, x):
    try:
        return x * 2 if x.shape[0] == 7 else x
    except Exception:  # noqa: BLE001  what a trace would be stopped by must be caught here
        return x


def looked_up(self, x):
    try:
        return x * FACTORS[x.shape[0]]
    except KeyError:
        return x


FACTORS = {7: 2.0}
SIZES = {
    "!=": lambda self, x: x if x.shape[0] != 7 else x * 2,
    "size": lambda self, x: x * 2 if x.size(0) == 7 else x,
    "len": lambda self, x: x * 2 if len(x) == 7 else x,
    "numel": lambda self, x: x * 2 if x.numel() == 7 * 32 else x,
    "whole shape": lambda self, x: x * 2 if x.shape == (7, 32) else x,
    "max": lambda self, x: x * max(x.shape[0] - 5, 1),
    "in a set": lambda self, x: x * 2 if x.shape[0] in {7, 9} else x,
    "shape in a set": lambda self, x: x * 2 if x.shape in {(7, 32)} else x,
    "key of a dict": lambda self, x: x * FACTORS.get(x.shape[0], 1.0),
    "dtype as a key": lambda self, x: x * {torch.float64: 3.0}.get(x.dtype, FACTORS.get(x.shape[0], 1.0)),
    "missing key": looked_up,
    "caught": caught,
    "text": lambda self, x: x * 2 if str(x.shape[0]) == "7" else x,
    "name": lambda self, x: x * getattr(self, f"factor_{x.shape[0]}", 1.0),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_on_which_python_decides(name):
    """The example has 4 rows; with 7 the forward does something else."""
    model_class = type("Sized", (Net,), {"between": SIZES[name], "factor_7": 2.0})
    original = model_class()
    model = prepare_diffq(original, X[:4], CONFIG)
    assert model.compression.scope == "module"
    assert re.search("a value or size|a tensor or its size|the length of a tensor", model.compression.scope_reason)
    for quantizer in model.compression.quantizers:
        weight = original.get_parameter(quantizer.spec.name)
        quantizer.pass_through(lambda weight=weight: weight)
    for rows in (1, 4, 7):
        assert torch.equal(model(X[:rows]), original(X[:rows]))
    assert not torch.equal(original(X[:7]), original(X[:8])[:7])


STATES = {
    "autocast": lambda self, x: x * 2 if torch.is_autocast_enabled("cpu") else x,
    "autocast on a GPU": lambda self, x: x * 2 if torch.is_autocast_enabled("cuda") else x,
    "its dtype": lambda self, x: x.to(torch.get_autocast_dtype("cpu")).float(),
    "either": lambda self, x: x * 2 if torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled() else x,
    "gradients in train": lambda self, x: x * 2 if self.training and not torch.is_grad_enabled() else x,
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_torch_that_python_asks_for(name):
    original = type("Asks", (Net,), {"between": STATES[name]})()
    autocast_before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    model = prepare_diffq(original, X, CONFIG)
    assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == autocast_before
    assert model.compression.scope == "module"
    for quantizer in model.compression.quantizers:
        weight = original.get_parameter(quantizer.spec.name)
        quantizer.pass_through(lambda weight=weight: weight)
    for state in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16), torch.no_grad()):
        with state:
            assert torch.equal(model(X), original(X))


def test_a_size_in_the_message_of_an_assertion_stays_in_the_graph():
    class Checks(Net):
        def between(self, x):
            torch._assert(x.shape[1] == 32, f"expected 32 features and not {x.shape[1]}")
            return x

    model = prepare_diffq(Checks(), X, CONFIG)
    assert model.compression.scope == "model"
    assert model(X[:3]).shape == (3, 8)


@pytest.mark.parametrize("model_class", [Frozen, Dann, Binary])
def test_the_gate_sees_it_where_tracing_does_not(model_class, monkeypatch):
    """Outputs are equal; gradients are not."""
    monkeypatch.setattr(trace, "_refused_while_tracing", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(trace, "_grad_state", lambda: None)
    with pytest.raises(CaptureError, match="in train: .*the gradient of|in train: .*values of the gradient of"):
        prepare_diffq(model_class(), X, CONFIG, scope="model")


def test_a_module_without_weights_stays_a_leaf_whatever_it_does():
    class Reversal(nn.Module):
        def forward(self, x):
            return Reverse.apply(x)

    original = nn.Sequential(nn.Linear(16, 32), Reversal(), nn.Linear(32, 8))
    model = prepare_diffq(original, X, CONFIG)
    assert model.compression.scope == "model"
    wanted, found = gradients(original), gradients(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_detach_is_an_operation_and_stays_in_the_graph():
    class Detaches(Net):
        def between(self, x):
            return x.detach()

    original = Detaches()
    model = prepare_diffq(original, X, CONFIG)
    assert model.compression.scope == "model"
    assert gradients(model)["body.bias"] is None


def test_a_backward_that_fails_is_no_reason_to_refuse():
    class NoBackward(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.view_as(x))

    class Inference(Net):
        def between(self, x):
            return NoBackward.apply(x)

    assert prepare_diffq(Inference(), X, CONFIG).compression.scope == "module"


def test_an_input_that_may_not_have_a_history():
    """The gate asks for the gradients of inputs; a forward that refuses such inputs is run without."""

    class Refuses(Net):
        def forward(self, x):
            if x.requires_grad:
                raise ValueError("not this one")
            return super().forward(x)

    assert prepare_diffq(Refuses(), X, CONFIG).compression.quantizers


G = {"w": torch.randn(4, 4), "none": None}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (G | {"w": G["w"] * 2}, "16 of 16 values of the gradient of w differ"),
        (G | {"w": -G["w"]}, "differ"),
        (G | {"w": torch.zeros(4, 4)}, "differ"),
        (G | {"w": None}, "the gradient of w is none, the original's there"),
        (G | {"none": torch.zeros(1)}, "the gradient of none is there, the original's none"),
        ("a RuntimeError", "the backward gives a RuntimeError, the original's gradients"),
        (G | {"w": G["w"] * (1 + 1e-3)}, "differ"),
    ],
)
def test_the_gate_sees_another_gradient(found, says):
    assert re.search(says, gate._gradient_difference(found, G))


def test_what_the_backward_raises_is_shown_and_its_type_alone_compared():
    kept = nn.Parameter(torch.ones(3))
    output = kept.exp()
    with torch.no_grad():
        output.mul_(2)  # which the backward of exp reads
    raised = gate._gradients(output, {"kept": kept})
    assert re.match(r"a RuntimeError: one of the variables needed for gradient computation", raised)
    assert gate._gradient_difference(raised, "a RuntimeError: at 0x7f") == ""


def test_the_gate_takes_another_order_of_summation_for_the_same():
    assert gate._gradient_difference(G | {"w": G["w"] * (1 + 1e-6)}, G) == ""


@pytest.mark.parametrize("scope", ["model", "module"])
def test_an_output_that_lost_its_history_is_seen(scope):
    """Values are equal in eval too; only ``requires_grad`` tells."""
    assert "that requires grad" in gate._difference(X, X.clone().requires_grad_(), "the output")


class AsksWithoutGrad(Net):
    def between(self, x):
        return x if torch.is_grad_enabled() or self.training else x * 2


class SetsInTrain(Net):
    def train(self, mode=True):
        self.factor = 1.0 if mode else 2.0
        return super().train(mode)

    def between(self, x):
        return x * self.factor


class ReadsTheDict(Net):
    def between(self, x):
        return x if vars(self)["training"] else x.clamp(-3, 3)


class ReadsPastTheClass(Net):
    def between(self, x):
        return x if object.__getattribute__(self, "training") else x.clamp(-3, 3)


class AsksForBoth(Net):
    def between(self, x):
        return x if self.training or torch.is_inference_mode_enabled() else x.clamp(-3, 3)


class TellsOthers(Net):
    mode: ClassVar[dict] = {}

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.mode[name] = value

    def between(self, x):
        return x if self.mode["training"] else x * 2


class AsksForInference(Net):
    def between(self, x):
        return x.softmax(-1) if torch.is_inference_mode_enabled() else x


@pytest.mark.parametrize(
    ("make", "modes", "refused"),
    [
        (Net, [True, False], None),
        (ReadsTheDict, [True, False, False], r"in train\(\) than in eval"),
        (ReadsPastTheClass, [True, False, False], r"in train\(\) than in eval"),
        (TellsOthers, [True, False, False], r"in train\(\) than in eval"),
        (AsksForBoth, [True, False, False], r"in train\(\) than in eval"),
        (AsksForInference, [True, False, False], "or in inference mode"),
        (AsksWithoutGrad, [True, False, False], r"under torch\.autocast or torch\.no_grad"),
        (SetsInTrain, [True, False, False], r"in train\(\) than in eval"),
    ],
)
def test_every_mode_is_traced_and_a_difference_is_named(make, modes, refused, monkeypatch):
    seen, traced = [], trace._traced
    monkeypatch.setattr(trace, "_traced", lambda module, *args: seen.append(module.training) or traced(module, *args))
    with pytest.raises(CaptureError, match=refused) if refused else contextlib.nullcontext():
        prepare_diffq(make().train(), X, CONFIG, scope="model")
    assert seen == modes
