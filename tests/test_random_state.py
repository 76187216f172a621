"""The random state of the user: no call that draws numbers of its own changes it, on a CPU or on GPUs that are in use or will be."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, ExportError, compress, prepare_diffq
from diffq_fx.example import restored_random_state
from diffq_fx.export.onnx.causes import failure_cause
from diffq_fx.export.onnx.examples import ExportExample

X = torch.randn(8, 64)
CONFIG = DiffQConfig(target_bits=5)


def prepared() -> None:
    prepare_diffq(nn.Linear(64, 64), X, CONFIG)


def compressed() -> None:
    compress(nn.Linear(64, 64), [X, X], CONFIG, steps=0, progress=False)


def explained() -> None:
    assert "draws random numbers" in failure_cause(nn.Dropout(), ExportExample.of(X), ExportError(""))


@pytest.mark.parametrize("call", [prepared, compressed, explained])
@pytest.mark.parametrize("in_use", [True, False])
def test_gpus_keep_their_random_state_and_get_no_seed_that_is_not_the_users(monkeypatch, call, in_use):
    states, seeds = {0: 5, 1: 7}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: (seeds.append(seed), states.update(dict.fromkeys(states, seed))))
    call()
    assert states == {0: 5, 1: 7}
    assert in_use or not seeds  # torch keeps a seed for a GPU that is not in use yet, and it would be the first one there


def test_a_seed_is_for_the_time_within_and_the_same_each_time():
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False))
    drawn = []
    for _ in range(2):
        with restored_random_state(3):
            drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state(legacy=False)) == str(before[2])
