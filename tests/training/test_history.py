"""What is kept for the curves of a training: few points, evenly, of the whole of it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, bits_report, prepare_diffq
from diffq_fx.integrations.schedule import keep_losses
from diffq_fx.methods.history import History


@pytest.mark.parametrize(("steps", "every"), [(100, 1), (10_000, 1), (10_000, 7), (100_000, 500)])
def test_a_curve_stays_small_even_and_whole(steps, every):
    history = History()
    for step in range(1, steps, every):
        history.add(step, {"loss": float(step)})
    points = history.curves["loss"]
    assert min(100, steps // every) - 1 <= len(points) < 256
    assert all(step == value for step, value in points)
    gaps = [after[0] - before[0] for before, after in zip(points, points[1:], strict=False)]
    assert max(gaps) <= 2 * min(gaps)
    assert points[0][0] == 1
    assert points[-1][0] > steps - 2 * max(gaps)


def test_each_curve_has_its_own_steps():
    history = History()
    for step in range(1000):
        history.add(step, {"often": step} | ({"seldom": -step} if step % 100 == 0 else {}))
    assert history.curves["seldom"] == [[step, -step] for step in range(0, 1000, 100)]
    assert len(history.curves["often"]) > 100


def test_a_tensor_is_kept_as_it_was():
    history, loss = History(), torch.ones((), requires_grad=True)
    history.add(1, {"loss": loss})
    with torch.no_grad():
        loss.mul_(2)
    assert history.curves == {"loss": [[1.0, 1.0]]}


def test_curves_go_with_a_copy_and_a_pickled_model():
    prepared = prepare_diffq(nn.Linear(64, 32), torch.zeros(1, 64), DiffQConfig(target_bits=4))
    prepared.compression.log(loss=2.5)
    copied, loaded = copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))
    prepared.compression.log(accuracy=1.0)
    assert bits_report(copied).curves == bits_report(loaded).curves == {"loss": [[0.0, 2.5]]}


def test_with_a_penalty_the_mean_of_the_bits_is_kept_too():
    torch.manual_seed(0)
    prepared = prepare_diffq(nn.Linear(64, 32), torch.zeros(1, 64), DiffQConfig(penalty=100.0))
    optimizer = torch.optim.Adam(prepared.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        prepared(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    curves = bits_report(prepared).curves
    mean, spread = curves["bits a weight, mean"], curves["bits a weight, standard deviation"]
    assert [step for step, _ in mean] == list(range(1, 11))
    assert mean[-1][1] < mean[0][1]
    bits_T = prepared.compression.bit_state().bits_T()  # of one layer, all channels of 64 weights
    assert [mean[-1][1], spread[-1][1]] == pytest.approx([float(bits_T.mean()), float(bits_T.std(correction=0))], rel=1e-4)


def test_what_is_logged_and_no_number_ends_no_training():
    model = prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64))
    numbers = {"loss": 2, "eval_loss": torch.tensor(0.5), "loss/np": np.float32(0.25)}
    keep_losses(model, {**numbers, "rate": 1.0, "loss_kind": "mse", "losses": [1, 2], "loss/layers": torch.ones(2), "loss/none": None})
    assert {name: values[0][1] for name, values in model.compression.curves.items()} == {"loss": 2, "eval_loss": 0.5, "loss/np": 0.25}
