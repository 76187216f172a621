"""Closures, optimizers inside optimizers, steps that are none: the bits of the plain loop, and one step counted for one step."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_optimizer_state_dict, set_state_dict
from torch.nn.functional import cross_entropy

from diffq_fx import DiffQConfig, model_size, prepare_diffq
from diffq_fx.methods import diffq_settings

AIMS = {
    "target": {},
    "penalty": {"penalty": 50.0},
    "entropy": {"size_of": "packed_file"},
    "entropy, penalty": {"size_of": "packed_file", "penalty": 50.0},
    "container, final bits": {"size_of": "onnx_file", "training_steps": 120},
    "moved at once": {"training_steps": 10},
}


@pytest.fixture(autouse=True)
def _the_bits_move_after_the_fifth_step(monkeypatch):
    monkeypatch.setattr(diffq_settings, "SENSITIVITY_STEPS", 5)


def make(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return prepare_diffq(net, torch.randn(2, 16), DiffQConfig(**{"training_steps": 300, **settings}))


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def plain(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def by_position(optimizer, loss):
    optimizer.step(closure_of(optimizer, loss))


def by_keyword(optimizer, loss):
    optimizer.step(closure=closure_of(optimizer, loss))


def train(model, optimizer, step, steps=20):
    torch.manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 16)
        step(optimizer, lambda x=x: cross_entropy(model(x), x[:, :4].argmax(1)))
    return model


def assert_same(model, expected):
    for (name, found), each in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(found, each), name


@pytest.mark.parametrize("step", [by_position, by_keyword])
@pytest.mark.parametrize("aim", AIMS)
def test_a_closure_trains_as_the_plain_loop_bit_by_bit(aim, step):
    model, expected = make(**AIMS[aim]), make(**AIMS[aim])
    start = [logits.detach().clone() for logits in expected.compression.logits]
    train(expected, adam(expected), plain)
    train(model, adam(model), step)
    assert_same(model, expected)
    assert not any(torch.equal(logits, old) for logits, old in zip(model.compression.logits, start, strict=True))


def test_a_closure_that_is_called_often_counts_as_one_step():
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, tolerance_grad=0, tolerance_change=0)
    train(model, optimizer, by_position, steps=2)
    assert int(model.compression.steps) == 2
    sums = torch.cat([q.gradient_sums[1].flatten() for q in model.compression.learned])
    assert 0 < float(sums.max()) <= 2
    assert model.compression.exact_bits() <= (4 * (16 * 32 + 32 * 4) + 32 * 36)


class Outer(torch.optim.Optimizer):
    """Steps other optimizers, as ZeRO, Muon with AdamW, and Lookahead do."""

    def __init__(self, *inner):
        super().__init__([p for each in inner for group in each.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for each in self.inner:
            each.step()
        return loss


class Sam(Outer):
    """Moves the weights up the gradient, and steps with the gradient from there."""

    def step(self, closure=None):
        up = [(p, 0.01 * p.grad) for p in self.param_groups[0]["params"] if p.grad is not None and p.dim() == 2 and p.shape[1] > 1]
        with torch.no_grad():
            for p, e in up:
                p.add_(e)
        torch.enable_grad()(closure)()
        with torch.no_grad():
            for p, e in up:
                p.sub_(e)
        self.inner[0].step()


def nested(model):
    return Outer(Outer(adam(model)))


def halves(model):
    bits = set(map(id, model.compression.logits))
    apart = [[p for p in model.parameters() if (id(p) in bits) == kind] for kind in (True, False)]
    return Outer(*(torch.optim.AdamW(part, 1e-2) for part in apart))


@pytest.mark.parametrize("aim", ["penalty", "container, final bits"])
@pytest.mark.parametrize("wrapped", [lambda model: Outer(adam(model)), nested, halves], ids=["one", "two deep", "bits apart"])
@pytest.mark.parametrize("step", [plain, by_keyword], ids=["plain", "closure"])
def test_optimizers_in_optimizers_train_as_the_inner_one_alone(step, wrapped, aim):
    model, expected = make(**AIMS[aim]), make(**AIMS[aim])
    train(expected, adam(expected), plain)
    train(model, wrapped(model), step)
    assert_same(model, expected)


def test_sharpness_aware_minimization_counts_one_step_and_presses_once():
    model = make(penalty=5000.0)
    optimizer = Sam(torch.optim.SGD(model.parameters(), 0.0))
    seen = []
    optimizer.inner[0].register_step_post_hook(lambda *_: seen.append([each.grad.clone() for each in model.compression.logits]))

    def both(outer, loss):
        loss().backward()
        outer.step(closure_of(outer, loss))

    train(model, optimizer, both, steps=1)
    assert int(model.compression.steps) == 1
    pressed = torch.autograd.grad(5000 * model_size(model), model.compression.logits)
    for found, each in zip(seen[0], pressed, strict=True):
        torch.testing.assert_close(found, each, rtol=0.1, atol=0.0)  # the loss has a small part beside it


@pytest.mark.parametrize("first", ["frozen", "seldom", "often", "later"])
def test_of_several_optimizers_the_one_that_steps_most_often_counts(first):
    model = make(training_steps=60)
    layers = [adam(model.get_submodule(name)) for name in "02"]
    every = {"frozen": [0, 1], "seldom": [5, 1], "often": [1, 5], "later": [1, 1]}[first]
    for step in range(30):
        x = torch.randn(8, 16)
        cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        for own, turn in zip(layers, every, strict=True):
            if first == "later" and own is layers[0] and step < 15:
                continue
            if turn and step % turn == 0:
                own.step()
        model.zero_grad()
    assert int(model.compression.steps) == 30
    assert model.compression.frozen


@pytest.mark.parametrize("aim", ["target", "container, final bits"])
def test_a_compiled_step_trains_as_the_plain_one(aim):
    def by_compiler(optimizer, loss):
        optimizer.zero_grad()
        loss().backward()
        compiled()

    model, expected = make(**AIMS[aim]), make(**AIMS[aim])
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    train(expected, torch.optim.SGD(expected.parameters(), 1e-2), plain)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # what is traced of the hooks is compiled anew for other values of the bits
        train(model, optimizer, by_compiler)
    torch._dynamo.reset()
    assert_same(model, expected)


def test_an_exception_within_a_step_leaves_nothing_behind():
    model, expected = make(), make()
    optimizer = Outer(adam(model))

    def failing():
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(failing)
    train(model, adam(model), plain)
    assert_same(train(expected, adam(expected), plain), model)


def test_a_step_for_the_sake_of_a_state_changes_nothing():
    for model in (make(), train(make(), adam(make()), plain, 0)):
        before = copy.deepcopy(model.state_dict())
        get_state_dict(model, adam(model))
        for (name, found), each in zip(model.state_dict().items(), before.values(), strict=True):
            assert torch.equal(found, each), name


def test_a_first_step_of_a_warm_up_counts():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, plain, steps=1)
    assert int(model.compression.steps) == 1


@pytest.mark.parametrize("order", ["together", "model first", "not strict"])
@pytest.mark.parametrize("steps", [3, 12, 13, 20], ids=["noise", "just final", "first with ranges", "rounding"])
def test_checkpoints_of_torch_distributed_resume_bit_by_bit(steps, order):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    settings = {"training_steps": 120}
    model = make(**settings)
    optimizer = adam(model)
    train(model, optimizer, plain, steps)
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer))
    again = make(**settings)
    other = adam(again)
    if order == "model first":
        set_model_state_dict(again, of_model)
        set_optimizer_state_dict(again, other, of_optimizer)
    else:
        options = StateDictOptions(strict=order == "together")
        set_state_dict(again, other, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
    assert_same(train(again, other, plain, 4), train(model, optimizer, plain, 4))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_skipped_step_leaves_all_as_it_was(frozen):
    model = make(training_steps=20 if frozen else 30)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    train(model, optimizer, plain, 4)
    before = copy.deepcopy(model.state_dict())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)  # as GradScaler tells a fused optimizer
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.step()
    for (name, found), each in zip(model.state_dict().items(), before.values(), strict=True):
        assert torch.equal(found, each), name


def test_final_bits_stay_under_momentum_and_decay():
    model = make(training_steps=50)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1.0)
    train(model, optimizer, plain, 5)
    before = [logits.detach().clone() for logits in model.compression.logits]
    train(model, optimizer, plain, 5)
    assert all(torch.equal(logits, old) for logits, old in zip(model.compression.logits, before, strict=True))
    assert all(parameter in optimizer.state for parameter in model.parameters())
