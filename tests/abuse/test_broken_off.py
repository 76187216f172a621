"""A training that is broken off anywhere goes on or is converted; states that do not fit are named; a forked process computes as its parent."""

import copy
import os
import random
import signal
import sys
import time
import warnings

import pytest
import torch
from torch import nn

import diffq_fx
from diffq_fx import DiffQConfig, convert, model_size, prepare_diffq
from diffq_fx.export import load_packed, save_packed

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)
PACKAGE = os.path.dirname(diffq_fx.__file__)
CONFIGS = {
    "widths": DiffQConfig(target_bits=3, training_steps=20),
    "packed file": DiffQConfig(target_bits=3, training_steps=20, size_of="packed_file"),
}


def prepared(config):
    torch.manual_seed(0)
    model = prepare_diffq(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), X, config)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


class Interrupt:
    """Ctrl-C at the n-th line of the package's own code."""

    def __init__(self, at=None):
        self.at, self.lines = at, 0

    def __enter__(self):
        sys.settrace(self.called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def called(self, frame, event, _):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, _):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.line


@pytest.mark.filterwarnings("ignore::diffq_fx.DiffQWarning")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("at_step", [0, 1, 2], ids=["noise", "bits become final", "rounding"])
def test_interrupted_at_any_line_of_a_step(at_step, name):
    config, places = CONFIGS[name], 4
    model, optimizer = prepared(config)
    for _ in range(at_step):
        step(model, optimizer)
    kept = copy.deepcopy((model, optimizer.state_dict()))
    with Interrupt() as counted:
        step(model, optimizer)
    assert counted.lines > 100
    for turn in range(places):
        model = copy.deepcopy(kept[0])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        optimizer.load_state_dict(kept[1])
        with pytest.raises(KeyboardInterrupt), Interrupt(at=1 + counted.lines * (2 * turn + 1) // (2 * places)):
            step(model, optimizer)
        state = copy.deepcopy(model.state_dict())
        twin, _ = prepared(config)
        twin.load_state_dict(state)
        assert torch.equal(model.eval()(X), twin.eval()(X)), "there is a state that no state_dict has"
        assert torch.equal(convert(copy.deepcopy(model))(X), model(X))
        model.train()
        for _ in range(3):
            step(model, optimizer)
        assert all(each.isfinite().all() for each in model.parameters())
        assert (model_size(model, exact=True) * 2**23 - model.compression.rest_bits_now()) / (
            16 * 24 + 24 * 8
        ) <= 3.05  # entropy moves with the weights


@pytest.mark.filterwarnings("ignore::diffq_fx.DiffQWarning", "ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, name):
    steps, path = 40, tmp_path / "checkpoint.pt"

    def train(pause=0.0):
        model, optimizer = prepared(CONFIGS[name])
        done = 0
        if path.exists():
            kept = torch.load(path, weights_only=True)
            done = kept["done"]
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
        while done < steps:
            torch.manual_seed(done)
            step(model, optimizer)
            done += 1
            torch.save({"done": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "draft")
            os.replace(tmp_path / "draft", path)
            time.sleep(pause)
        return model

    def value(tensor):
        return tensor.detach().clone() if isinstance(tensor, torch.Tensor) else tensor

    wanted = {key: value(tensor) for key, tensor in train().state_dict().items()}
    path.unlink()
    draw, done = random.Random(0), 0
    for _ in range(4):
        if not (pid := os.fork()):
            try:
                signal.alarm(60)
                train(pause=0.02)
                os._exit(0)
            finally:
                os._exit(1)
        while not path.exists() or torch.load(path, weights_only=True)["done"] == done:
            time.sleep(0.001)  # until it has made a step of its own
        time.sleep(draw.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        done = torch.load(path, weights_only=True)["done"]
    assert 4 <= done < steps
    found = train().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], each) if isinstance(each, torch.Tensor) else found[key] == each for key, each in wanted.items())


def states():
    with warnings.catch_warnings(action="ignore"):
        model, optimizer = prepared(CONFIGS["widths"])
        step(model, optimizer)
        return {"prepared": model.eval(), "converted": convert(copy.deepcopy(model)).eval()}


MODELS = states()
KEYS = [(kind, key) for kind, model in MODELS.items() for key in model.state_dict()]


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_a_state_that_does_not_fit_is_named(kind, key):
    model = copy.deepcopy(MODELS[kind])
    wanted, state = model(X), model.state_dict()
    value = state[key]
    broken = {"missing": {k: v for k, v in state.items() if k != key}, "more": {**state, f"{key}.more": torch.zeros(2)}}
    if isinstance(value, torch.Tensor):
        broken["another shape"] = {**state, key: torch.zeros(*value.shape, 3, dtype=value.dtype)}
        broken["a shape as long"] = {**state, key: value.reshape(1, *value.shape)} if value.dim() else {}
    for how, wrong in broken.items():
        with pytest.raises((RuntimeError, diffq_fx.DiffQError), match=key.replace(".", r"\.") if wrong else None):
            model.load_state_dict(wrong)
        assert torch.equal(model.eval()(X), wanted), how
    model.load_state_dict(state)
    assert torch.equal(model(X), wanted)


@pytest.mark.filterwarnings("ignore::diffq_fx.DiffQWarning", "ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_as_its_parent(tmp_path):
    model, optimizer = prepared(CONFIGS["widths"])
    step(model, optimizer)  # the kernels, and torch's generators, are in use
    path = save_packed(convert(copy.deepcopy(model)), tmp_path / "m")
    wanted = {name: value.clone() for name, value in load_packed(path).items()}

    def work():
        step(model, optimizer)
        return (
            all(torch.equal(value, wanted[name]) for name, value in load_packed(path).items()) and convert(copy.deepcopy(model)) is not None
        )

    if not (pid := os.fork()):
        signal.alarm(60)  # a lock that a thread of the parent held would be for ever
        try:
            os._exit(0 if work() else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert work()
