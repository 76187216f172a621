"""What eval() and convert use is made from values, whatever wrote them; averages and restarts at any step do no harm."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffq_fx import DiffQConfig, DiffQError, DivergenceError, convert, freeze_bits, model_size, prepare, prepare_diffq
from diffq_fx.errors import PreparationError
from diffq_fx.methods import LSQ, STE, ProductQuantization, QuantNoise, diffq_settings

X = torch.linspace(-1, 1, 16 * 32).view(16, 32).sin()
METHODS = {
    "bits": DiffQConfig(training_steps=120),
    "entropy": DiffQConfig(training_steps=120, size_of="packed_file"),
    "STE": STE(bits=3),
    "LSQ": LSQ(bits=3),
    "noise": QuantNoise(bits=3),
}


@pytest.fixture(autouse=True)
def _the_bits_move_after_the_fifth_step(monkeypatch):
    monkeypatch.setattr(diffq_settings, "SENSITIVITY_STEPS", 5)


def make(method=METHODS["bits"]):
    torch.manual_seed(0)
    return prepare(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)), X, method)


def train(model, steps, optimizer=None, after=lambda: None):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2) if optimizer is None else optimizer
    torch.manual_seed(steps)
    for _ in range(steps):
        x = torch.randn(8, 32)
        optimizer.zero_grad()
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
        after()
    return model


def through_data(tensor, value):
    tensor.data.copy_(value)


def in_place(tensor, value):
    with torch.no_grad():
        tensor.copy_(value)


def through_memory(tensor, value):
    tensor.detach().numpy()[...] = value.numpy()


WAYS = [through_data, in_place, through_memory]


@torch.no_grad()
def of_eval(model):
    return model(X)


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_eval_and_convert_follow_a_state_however_it_is_written(method, frozen, write):
    other, model = train(make(METHODS[method]), 15 if frozen else 6), make(METHODS[method]).eval()
    before = of_eval(model)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            write(tensor, state[name])
    found, expected = of_eval(model), of_eval(other.eval())
    assert not torch.equal(found, before)
    assert torch.equal(found, expected)
    assert torch.equal(convert(model)(X), expected)


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_bits_of_one_layer_move_the_widths_of_all_at_once(index, write):
    """Under a target the others have to give: also where it is the last layer whose bits were written."""
    model = make().eval()
    of_eval(model)
    logits = model.compression.logits[index]
    write(logits, torch.full_like(logits, 0.4))
    found = of_eval(model)
    assert torch.equal(found, of_eval(model)), "the first forward has them all"
    assert torch.equal(convert(model)(X), found)
    assert model_size(model, exact=True) * 2**23 <= 4 * (32 * 48 + 48 * 8) + 32 * 56


def test_threads_see_one_rounded_model():
    model = train(make(), 6).eval()
    expected, found = of_eval(model), [None] * 8
    model.eval()  # drops what is kept

    def run(i):
        found[i] = of_eval(model)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("method", ["bits", "entropy", "STE", "LSQ"])
@pytest.mark.filterwarnings("ignore")
def test_an_average_with_buffers_holds_its_size_and_its_widths(method, decay):
    model = make(METHODS[method])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    train(model, 60, after=lambda: average.update_parameters(model))
    averaged = average.module.eval()
    expected = of_eval(averaged)
    assert torch.equal(convert(averaged)(X), expected)
    if method in ("STE", "LSQ"):
        assert all(bool((q.rounded_bits() == 3).all()) for q in averaged.compression.quantizers)
        return
    if decay <= 0.9:  # by now the noise is forgotten
        assert averaged.compression.frozen
        for own, of_model in zip(averaged.compression.learned, model.compression.learned, strict=True):
            assert torch.equal(own.width, of_model.width)
    if method == "bits":
        assert model_size(averaged, exact=True) * 2**23 <= 4 * (32 * 48 + 48 * 8) + 32 * 56


KILLED = [({}, at) for at in (1, 4, 5, 6, 11, 12, 13, 30)]
KILLED += [
    (each, at) for each in ({"size_of": "onnx_file"}, {"size_of": "packed_file"}, {"penalty": 5.0}, {"group_size": 8}) for at in (3, 12)
]


@pytest.mark.parametrize(("settings", "at"), KILLED, ids=str)
def test_a_training_that_is_killed_at_any_step_ends_bitwise_the_same(at, settings):
    method = DiffQConfig(**{"training_steps": 120, **settings})
    model, again = make(method), make(method)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, at, optimizer)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other = torch.optim.AdamW(again.parameters(), 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, 16, optimizer)
    train(again, 16, other)
    for (name, found), each in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, each), name


def test_two_optimizers_that_hold_bits_resume_bitwise_the_same():
    def halves(model):
        return [torch.optim.AdamW(layer.parameters(), 1e-2) for layer in (model.get_submodule("0"), model.get_submodule("2"))]

    def both(model, optimizers, steps):
        torch.manual_seed(steps)
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (model(X) - X[:, :8]).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()

    model, again = make(), make()
    own, others = halves(model), halves(again)
    both(model, own, 3)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    for optimizer, other in zip(own, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    both(model, own, 4)
    both(again, others, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("phase", [3, 14], ids=["noise", "rounding"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"penalty": 5.0}, {"target_bits": None}], ids=str)
def test_a_loss_that_is_not_finite_is_an_error_before_the_step(settings, value, phase):
    model = make(DiffQConfig(**{"training_steps": 120, **settings}))
    if phase == 14 and settings:
        freeze_bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, phase, optimizer)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    (model(X).square().mean() * value).backward()
    with pytest.raises(
        DivergenceError, match=rf"step {phase + 1}: the gradient of weight '0.weight' is not finite in \d+ of 1536 places, first at"
    ):
        optimizer.step()
    for (name, found), each in zip(model.state_dict().items(), before.values(), strict=True):
        assert torch.equal(found, each), name
    train(model, 2, optimizer)
    assert int(model.compression.steps) == phase + 2


@pytest.mark.parametrize("method", ["bits", "STE", "LSQ"])
@pytest.mark.filterwarnings("ignore")
def test_convert_names_a_weight_that_is_not_finite(method):
    model = make(METHODS[method])
    model.get_parameter("2.weight").data[1, 2] = float("inf")
    with pytest.raises(
        DivergenceError, match=r"weight '2.weight' is not finite in 1 of 384 places, first at \(1, 2\): its training diverged"
    ):
        convert(model)


@pytest.mark.parametrize("where", ["eval", "convert"])
@pytest.mark.parametrize(("method", "parameter"), [("bits", "clip"), ("symmetric", "clip"), ("LSQ", "moved"), ("codebook", "centroids")])
@pytest.mark.filterwarnings("ignore")
def test_a_range_that_is_not_finite_is_named(method, parameter, where):
    others = {"symmetric": DiffQConfig(grid="symmetric", target_bits=5), "codebook": ProductQuantization(entries=8)}
    model = make({**METHODS, **others}[method])
    if method in ("bits", "symmetric"):
        freeze_bits(model)
    if where == "eval":
        model.eval()(X)
    found = dict(model.compression.quantizers[1].named_parameters(recurse=False))[parameter]
    with torch.no_grad():
        found.view(-1)[0] = float("nan")
    with pytest.raises(DivergenceError, match=rf"{parameter} of weight '2.weight' is not finite in 1 of {found.numel()} places, first at"):
        convert(model) if where == "convert" else model(X)


def test_logits_that_are_not_finite_are_named():
    model = make()
    model.compression.logits[1].data[3] = float("nan")
    model(X)  # no undefined behaviour on the way
    with pytest.raises(DivergenceError, match=r"logits of weight '2.weight' is not finite in 1 of 8 places, first at \(3, 0\)"):
        model.eval()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_the_default_dtype_is_not_that_of_the_bits(method, default):
    torch.set_default_dtype(default)
    try:
        net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
        x = torch.randn(8, 32)
        model = prepare(net, x, METHODS[method])
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(14):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert torch.equal(convert(model)(x), model.eval()(x))
    finally:
        torch.set_default_dtype(torch.float32)
    state = {name: each.dtype for name, each in model.state_dict().items() if "quantizer" in name and not name.endswith("pressure_sums")}
    assert set(state.values()) <= {torch.float32}, state


@pytest.mark.filterwarnings("ignore")
def test_inference_mode_before_and_after():
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    with torch.inference_mode():
        model = prepare_diffq(net, X.clone(), METHODS["bits"])
    train(model, 3).eval()
    with torch.inference_mode():
        model(X)
        model_size(model, exact=True)
        converted = convert(model)
    x = X.clone().requires_grad_()
    (model(x).sum() + converted(x).sum()).backward()
    train(model.train(), 3)
    with (
        torch.inference_mode(),
        pytest.raises(PreparationError, match=r"'weight' was made under torch.inference_mode\(\) and can never train"),
    ):
        prepare_diffq(nn.Linear(32, 4), X)


@pytest.mark.parametrize("train_mode", [True, False])
def test_transforms_of_torch_func_are_refused(train_mode):
    model = make().train(train_mode)
    for transformed in (torch.func.vmap(model, randomness="same"), torch.func.jacrev(model), lambda x: torch.func.jvp(model, (x,), (x,))):
        with pytest.raises(DiffQError, match=r"weight '0.weight': torch.func's transforms .* do not go through a prepared model"):
            transformed(X)
    torch.func.functional_call(model, dict(model.named_parameters()), (X,))
