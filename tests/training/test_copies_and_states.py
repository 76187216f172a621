"""Averages, pickles, loaded states and several ranks train on as the model itself does, whatever the size to hold."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffq_fx import DiffQConfig, DiffQWarning, convert, convert_diffq, freeze_bits, model_size, prepare, prepare_diffq, recompute_weights
from diffq_fx.methods import LSQ, STE, ProductQuantization, QuantNoise

SIZES = {
    "bits": {},
    "entropy": {"size_of": "packed_file"},
    "entropy, MiB": {"size_of": "packed_file", "target_mib": 0.015},
    "entropy, penalty": {"size_of": "packed_file", "penalty": 1.0},
}
every_size = pytest.mark.parametrize("settings", SIZES.values(), ids=SIZES)


class Net(nn.Module):
    """With a buffer of its own, which the graph reads, and one of a batch norm, which training changes."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Linear(256, 32)
        self.inner = nn.Module()
        self.inner.register_buffer("offset", torch.zeros(256))
        self.scale = nn.Parameter(torch.ones(32))  # a parameter of the whole model itself
        self.register_buffer("shift", torch.zeros(32))

    def forward(self, x):
        return self.shift + self.scale * self.last((self.norm(self.first(x)) + self.inner.offset).relu())


def make(seed=0, **settings):
    torch.manual_seed(seed)
    return prepare_diffq(Net(), torch.randn(8, 64), DiffQConfig(**settings)).train()


def adam(model, **settings):
    return torch.optim.Adam(model.parameters(), lr=3e-3, **settings)


def train(model, optimizer, steps, after=lambda: None):
    for _ in range(steps):
        x = torch.randn(16, 64)
        optimizer.zero_grad()
        (model(x) - x[:, :32]).square().mean().backward()
        optimizer.step()
        after()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def assert_same_state(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert torch.equal(found[name], each), name


X = torch.linspace(-1, 1, 8 * 64).view(8, 64).sin()


@every_size
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("steps", [25, 45], ids=["noise", "rounding"])
def test_a_loaded_training_goes_on_bit_by_bit(settings, assign, steps):
    settings = settings | {"training_steps": 400}
    model = make(**settings)
    optimizer = adam(model)
    train(model, optimizer, steps)
    again = make(1, **settings)
    state, of_optimizer = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again.load_state_dict(state, assign=assign)
    other = adam(again)
    other.load_state_dict(of_optimizer)
    for each, its in ((model, optimizer), (again, other)):
        torch.manual_seed(4)
        train(each, its, 5)
    assert_same_state(again, model)


OTHERS = {
    "paper": DiffQConfig.paper(min_size=0),
    "STE": STE(bits=3),
    "LSQ": LSQ(bits=3),
    "Quant-Noise": QuantNoise(bits=3),
    "Quant-Noise, held range": QuantNoise(bits=3, range="least_error", range_every=4),
    "codebook": ProductQuantization(entries=16, update_every=4),
    "codebook, zeros": ProductQuantization(entries=16, noise="proxy"),
}


@pytest.mark.parametrize("method", OTHERS.values(), ids=OTHERS)
def test_a_loaded_training_of_another_method_goes_on_bit_by_bit(method):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(prepare(Net(), X, method).train())
    model, again = models
    optimizer = adam(model)
    train(model, optimizer, 6)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other = adam(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (again, other)):
        torch.manual_seed(4)
        train(each, its, 7)
    assert_same_state(again, model)


@every_size
def test_weights_that_were_put_in_place_of_others_are_the_ones_that_count(settings):
    model = make(**settings)
    train(model, adam(model), 25)
    again = make(1, **settings)
    again.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert model_size(again, exact=True) == model_size(model, exact=True)
    assert torch.equal(convert_diffq(again)(X), convert_diffq(model)(X))
    freeze_bits(again)
    freeze_bits(model)
    assert torch.equal(again.eval()(X), model.eval()(X))


@every_size
@pytest.mark.parametrize("final", [False, True], ids=["noise", "final bits"])
@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_compiled_model_in_eval_follows_what_is_loaded(settings, final, way):
    torch._dynamo.reset()
    model = make(**settings)
    train(model, adam(model), 25)
    if final:
        freeze_bits(model)
    other = way(make(1, **settings).eval())
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(X)
        compiled.load_state_dict({f"_orig_mod.{name}": each for name, each in model.state_dict().items()})
        torch.testing.assert_close(compiled(X), model.eval()(X))
    torch._dynamo.reset()


@every_size
def test_looking_at_the_size_changes_no_training(settings):
    model, looked_at = make(**settings), make(**settings)
    for each, look in ((model, lambda: None), (looked_at, lambda: model_size(looked_at, exact=True))):
        torch.manual_seed(4)
        train(each, adam(each), 12, after=look)
        model_size(each, exact=True)  # the widths of this moment
    assert_same_state(looked_at, model)


@every_size
@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_trains_as_the_model_and_counts_what_is_its_own(settings, way):
    model = make(**settings)
    train(model, adam(model), 3)
    twin = way(model)
    assert model_size(twin, exact=True) == model_size(model, exact=True)
    for each in (twin, model):
        torch.manual_seed(4)
        train(each, adam(each), 3)
    assert_same_state(twin, model)
    twin._apply(lambda tensor: tensor.clone())  # as a move to a device does: the buffers are others from now on
    own = {id(tensor) for tensor in (*twin.parameters(), *twin.buffers())}
    assert all(id(registry[name]) in own for registry, name in (*twin.compression.rest, *(q.place for q in twin.compression.quantizers)))
    before = model_size(twin, exact=True)
    twin.get_buffer("inner.offset").normal_()
    assert (model_size(twin, exact=True) > before) == (settings.get("size_of") == "packed_file")


def test_a_moving_average_that_is_in_part_of_the_noise_phase_says_so():
    model = make(training_steps=30)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, adam(model), 30, after=lambda: ema.update_parameters(model))
    with pytest.warns(DiffQWarning, match="the model is an average, 5% of it from the noise phase: its widths"):
        converted = convert_diffq(ema)
    assert torch.equal(converted(X), ema.eval()(X))
    assert not converted.compression.in_noise


@every_size
@pytest.mark.parametrize("way", ["eval", "convert"])
def test_a_moving_average_has_the_final_bits_and_ranges(settings, way):
    model = make(training_steps=30, **settings)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(model, adam(model), 30, after=lambda: ema.update_parameters(model))
    averaged = ema.module.eval() if way == "eval" else ema.module
    assert torch.equal(convert_diffq(averaged)(X), ema.eval()(X))
    assert averaged.compression.frozen
    for own, of_model in zip(averaged.compression.learned, model.compression.learned, strict=True):
        assert torch.equal(own.width, of_model.width)
        assert torch.equal(own.logits, of_model.logits)  # as they are, so that its state says the same widths
        if own.clip is not None:
            assert torch.equal(own.range_low, of_model.range_low)


@pytest.mark.parametrize("size_of", ["widths", "packed_file"])
def test_a_fused_step_that_a_scaler_has_skipped_says_nothing(size_of):
    model, scaler = make(size_of=size_of), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-3, fused=True) for module in (model.first, model.last)]

    def step(times):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(X).square().mean()).backward()
        for each in (model.first.weight, model.compression.learned[0].logits):
            each.grad.mul_(times)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    step(1)
    worth, old = model.compression.lambda_per_bit, model.first.weight.detach().clone()
    step(float("inf"))
    assert torch.equal(model.first.weight, old)
    for each in (model.compression.lambda_per_bit, *model.parameters()):  # those of the other optimizer, which does step
        assert bool(torch.isfinite(each).all())
    assert float(worth) != 0
    step(1)
    assert not torch.equal(model.first.weight, old)


def _rank(rank, folder, settings, look):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = make(rank, **settings)  # weights of its own, until the wrapper gives it those of the first rank
    if look is None:
        model.load_state_dict(torch.load(f"{folder}/state.pt"))
    wrapped = DistributedDataParallel(model, broadcast_buffers=look is not None)
    torch.manual_seed(0)
    optimizer = adam(wrapped)
    for _ in range(6):
        x = torch.randn(16, 64) + rank  # data of its own, so that batch norms differ
        optimizer.zero_grad()
        with recompute_weights():
            loss = (wrapped(x) - x[:, :32]).square().mean()
        loss.backward()
        optimizer.step()
        if look and rank == 0:
            model_size(model, exact=True)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    widths = {q.spec.name + " width": q.width for q in model.eval().compression.learned}
    torch.save({**parameters, **widths, "range_scale": model.compression.range_scale}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "look", "training_steps"),
    [("entropy", None, None), ("entropy, MiB", False, None), ("entropy, MiB", True, None), ("entropy, MiB", False, 30)],
    ids=["loaded", "buffers", "one rank looks", "final bits"],
)
def test_ranks_hold_the_same_entropy_coded_size(size, look, training_steps, tmp_path):
    settings = {**SIZES[size], "training_steps": training_steps}
    if look is None:
        model = make(5, **settings)
        train(model, adam(model), 25)
        torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), settings, look), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, each in first.items():
        assert torch.equal(each, second[name]), name


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("finish", [lambda model: model, convert])
def test_safetensors_of_tied_weights_load(scope, finish, tmp_path):
    """A file of safetensors holds a shared tensor under one of its names."""
    from safetensors.torch import load_model, save_model

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    ids = torch.randint(0, 50, (2, 5))
    saved, loaded = (finish(prepare(Tied(), ids, LSQ(bits=4), scope=scope)).eval() for _ in range(2))
    assert not torch.equal(saved(ids), loaded(ids))
    save_model(saved, tmp_path / "m.safetensors")
    assert load_model(loaded, tmp_path / "m.safetensors") == (set(), [])
    assert torch.equal(saved(ids), loaded(ids))
