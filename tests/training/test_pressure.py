"""The size meets its target whatever the user's loop does, and the bits go where the loss wants them."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import diffq_fx
from diffq_fx import DiffQConfig, convert_diffq, model_size, prepare_diffq, setup_optimizer
from diffq_fx.errors import DiffQWarning

STEPS = 60


class TwoBranches(nn.Module):
    """Half of the weights see the loss at full strength, the other half at a hundredth."""

    def __init__(self):
        super().__init__()
        self.strong, self.weak = nn.Linear(48, 64), nn.Linear(48, 64)

    def forward(self, x):
        return self.strong(x) + 0.01 * self.weak(x)


def task():
    return torch.randn(256, 48), torch.randn(256, 64)


def prepared(**settings):
    settings = {"training_steps": 10**6, **settings}
    return prepare_diffq(TwoBranches(), torch.zeros(2, 48), DiffQConfig(**settings))


def target_mib(model):
    return (model.compression.budget_bits() + model.compression.rest_bits) / 8 / 2**20


def loss_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def plain(model, batch, optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model, batch).backward()
    for optimizer in optimizers:
        optimizer.step()


def accumulated(model, batch, optimizers):
    optimizers[0].zero_grad()
    for part in zip(*(t.chunk(4) for t in batch), strict=True):
        (loss_of(model, part) / 4).backward()
    optimizers[0].step()


def clipped(model, batch, optimizers):
    optimizers[0].zero_grad()
    loss_of(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizers[0].step()


class Scaled:
    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=10)

    def __call__(self, model, batch, optimizers):
        optimizers[0].zero_grad()
        self.scaler.scale(loss_of(model, batch)).backward()
        self.scaler.step(optimizers[0])
        self.scaler.update()


class Autocast(Scaled):
    """Mixed precision as users have it: autocast, and for float16 a scaler."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __call__(self, model, batch, optimizers):
        optimizers[0].zero_grad()
        with torch.autocast("cpu", dtype=self.dtype):
            loss = loss_of(model, batch)
        (self.scaler.scale(loss) if self.dtype == torch.float16 else loss).backward()
        if self.dtype == torch.float16:
            self.scaler.unscale_(optimizers[0])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.scaler.step(optimizers[0])
            self.scaler.update()
        else:
            optimizers[0].step()


def adam(model, **kw):
    return [torch.optim.Adam(model.parameters(), lr=1e-3, **kw)]


def several(model):
    halves = [model.strong.parameters(), model.weak.parameters()]
    return [torch.optim.AdamW(half, lr=1e-3) for half in halves]


WAYS = {
    "adam": (adam, plain, 1.0),
    "adamw with strong decay": (lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=1.0)], plain, 1.0),
    "sgd": (lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)], plain, 1.0),
    "fused adam": (lambda m: adam(m, fused=True), plain, 1.0),
    "foreach adam": (lambda m: adam(m, foreach=True), plain, 1.0),
    "loss times 1e-4": (adam, plain, 1e-4),
    "loss times 1e4": (adam, plain, 1e4),
    "sgd, loss times 1e-4": (lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)], plain, 1e-4),
    "accumulation": (adam, accumulated, 1.0),
    "clipping": (adam, clipped, 1.0),
    "grad scaler": (adam, Scaled(), 1.0),
    "grad scaler, fused": (lambda m: adam(m, fused=True), Scaled(), 1.0),
    "autocast bfloat16": (adam, Autocast(torch.bfloat16), 1.0),
    "autocast float16, grad scaler, unscaled and clipped": (adam, Autocast(torch.float16), 1.0),
    "two optimizers": (several, plain, 1.0),
    "bits in their own group": (lambda m: [setup_optimizer(torch.optim.SGD(m.parameters(), 0.1), m, bits_lr=0.5)], plain, 1.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_exact_size_meets_the_target(way, monkeypatch):
    make, step, scale = WAYS[way]
    monkeypatch.setitem(globals(), "loss_of", lambda model, batch, plain=loss_of: scale * plain(model, batch))
    model, batch = prepared(), task()
    optimizers = make(model)
    for _ in range(STEPS):
        step(model, batch, optimizers)
    target = target_mib(model)
    assert float(model_size(model).detach()) == pytest.approx(target, rel=0.01)
    assert model_size(model, exact=True) == pytest.approx(target, rel=0.01)
    assert model_size(model, exact=True) <= target
    assert int(model.compression.steps) == STEPS
    strong, weak = (q.bits().mean().item() for q in model.compression.quantizers)
    assert strong > weak + 0.05, (strong, weak)  # the bits went where the loss is
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("target", [2.8, 3.5, 5, 7])
def test_every_target_is_met(target):
    model, batch = prepared(target_bits=target), task()
    (optimizer,) = adam(model)
    for _ in range(STEPS):
        plain(model, batch, [optimizer])
    assert model_size(model, exact=True) == pytest.approx(target_mib(model), rel=0.01)


@pytest.mark.parametrize("steps", [1, 3])
def test_even_a_short_training_converts_at_the_target(steps):
    model, batch = prepared(), task()
    (optimizer,) = adam(model)
    for _ in range(steps):
        plain(model, batch, [optimizer])
    assert model_size(model, exact=True) == pytest.approx(target_mib(model), rel=0.01)


def test_target_in_mib_counts_the_whole_model():
    model, batch = prepared(target_mib=0.005), task()
    (optimizer,) = adam(model)
    for _ in range(STEPS):
        plain(model, batch, [optimizer])
    assert model_size(model, exact=True) == pytest.approx(0.005, rel=0.01)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_penalty_is_the_papers_gradient_once_a_step(accumulate):
    penalty = 3.0
    ours, by_hand = prepared(penalty=penalty), prepared(target_bits=None)
    by_hand.load_state_dict(ours.state_dict())
    batch = task()
    grads = []
    for model, extra in ((ours, 0.0), (by_hand, penalty)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen = {}
        optimizer.register_step_post_hook(
            lambda *_, model=model, seen=seen: seen.update(g=[q.logits.grad.clone() for q in model.compression.learned])
        )
        torch.manual_seed(5)
        for _ in range(accumulate):
            ((loss_of(model, batch) + extra * model_size(model)) / accumulate).backward()
        optimizer.step()
        grads.append(seen["g"])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
        assert float(b.abs().max()) > 0


def test_larger_penalty_gives_a_smaller_model():
    sizes = []
    for penalty in (0.0001, 100.0):
        model, batch = prepared(penalty=penalty), task()
        (optimizer,) = adam(model)
        for _ in range(STEPS):
            plain(model, batch, [optimizer])
        sizes.append(model_size(model, exact=True))
    assert sizes[1] < 0.9 * sizes[0]


def test_no_pressure_leaves_the_bits_to_the_loss():
    model, batch = prepared(target_bits=None), task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, batch).backward()
    before = [q.logits.grad.clone() for q in model.compression.learned]
    optimizer.step()
    for quantizer, grad in zip(model.compression.learned, before, strict=True):
        assert torch.equal(quantizer.logits.grad, grad)


def test_a_deep_copy_trains_on_its_own():
    model, batch = prepared(), task()
    twin = copy.deepcopy(model)
    (optimizer,) = adam(twin)
    untouched = [q.logits.clone() for q in model.compression.learned]
    for _ in range(30):
        plain(twin, batch, [optimizer])
    assert int(twin.compression.steps) == 30
    assert int(model.compression.steps) == 0
    assert all(torch.equal(q.logits, old) for q, old in zip(model.compression.learned, untouched, strict=True))
    assert float(model_size(twin).detach()) == pytest.approx(target_mib(twin), rel=0.01)


def test_training_resumes_from_a_state_dict():
    model, batch = prepared(), task()
    (optimizer,) = adam(model)
    for _ in range(30):
        plain(model, batch, [optimizer])
    again = prepared()
    again.load_state_dict(model.state_dict())
    assert int(again.compression.steps) == 30
    assert model_size(again, exact=True) == model_size(model, exact=True)
    assert torch.equal(again.eval()(batch[0]), model.eval()(batch[0]))


def test_eval_follows_logits_that_change_without_a_call_of_eval():
    model, batch = prepared(target_bits=None), task()
    model.eval()
    before = model(batch[0])
    with torch.no_grad():
        for quantizer in model.compression.learned:
            quantizer.logits.fill_(-5.0)
    assert not torch.equal(model(batch[0]), before)
    assert all(bool((q.width == 1).all()) for q in model.compression.learned)


def test_eval_rounds_once(monkeypatch):
    model, batch = prepared(), task()
    model.eval()
    calls = []
    kind = type(model.compression.quantizers[0])
    rounded = kind.rounded_weight
    monkeypatch.setattr(kind, "rounded_weight", lambda self, weight: calls.append(self) or rounded(self, weight))
    for _ in range(3):
        model(batch[0])
    assert len(calls) == 2  # two weights, once each
    with torch.no_grad():
        model.strong.weight.mul_(2)
    model(batch[0])
    assert len(calls) == 3


def test_an_exception_leaves_nothing_behind():
    model, batch = prepared(), task()
    model.eval()
    expected = model(batch[0])
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model(batch[0]), expected)


def test_convert_says_that_the_bits_never_moved():
    model, batch = prepared(), task()
    optimizer = torch.optim.SGD([model.strong.weight, model.weak.weight], lr=0.1)  # without the bits
    plain(model, batch, [optimizer])
    with pytest.warns(DiffQWarning, match="bits never moved: no optimizer that holds them"):
        convert_diffq(model)


def test_convert_says_that_no_pressure_reached_the_model():
    model, batch = prepared(target_bits=None), task()
    plain(model, batch, adam(model))
    with pytest.warns(DiffQWarning, match="no pressure on the size ever reached"):
        convert_diffq(model)
    optimizers = adam(model)
    (loss_of(model, batch) + 0.1 * model_size(model)).backward()
    optimizers[0].step()
    convert_diffq(model)


def test_size_and_report_need_a_prepared_model():
    with pytest.raises(diffq_fx.PreparationError, match=r"model_size: the Linear is not prepared\. Call prepare_diffq"):
        model_size(nn.Linear(2, 2))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_one_width_for_the_whole_model_stays_where_the_target_has_it(optimizer):
    torch.manual_seed(0)
    model = prepare_diffq(nn.Linear(32, 16), torch.zeros(1, 32), DiffQConfig(group_size="tensor", target_bits=6, training_steps=10**6))
    (quantizer,), optimizer = model.compression.learned, optimizer(model.parameters(), lr=1e-2)
    before = quantizer.bits().item()
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
        assert quantizer.logits.grad.abs().item() < 1e-3, "the projection leaves nothing but rounding"
    assert quantizer.bits().item() == pytest.approx(before, abs=0.01)
    assert model_size(model, exact=True) * 2**23 <= 6 * 512 + 16 * 32
