"""CIFAR: its formats, its nets' sizes, all methods, and a resumed training."""

import functools
import io
import json
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_data import images, make_cifar
from safetensors.torch import load_file
from torch import nn

from diffq_fx import model_size, prepare
from diffq_fx.methods import STE
from recipes import cifar
from recipes.common.loop import Training, float_mib
from recipes.common.main import main
from recipes.common.processes import Processes
from recipes.common.recipe import Lacking
from recipes.common.settings import parse
from recipes.data.cifar import load_cifar

METHODS = ("diffq", "diffq-paper", "ste", "lsq", "quant-noise", "pq", "lc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("cifar")
    make_cifar(base)
    return base


class TestFormats:
    def test_pickles(self, folder):
        (x, y), (test, _) = load_cifar(folder, 10)
        assert x.shape == (40, 3, 32, 32)
        assert len(test) == 8
        expected = images(8, 1)
        assert np.array_equal(x[8:16], expected[0])
        assert np.array_equal(y[8:16], expected[1])

    def test_binary_files_have_the_fine_label_second(self, folder):
        (x, y), _ = load_cifar(folder / "cifar-100-binary", 100)
        expected = images(8)
        assert np.array_equal(x, expected[0])
        assert np.array_equal(y, expected[1])

    def test_jpegs(self, tmp_path):
        blobs = []
        for value in (10, 200, 90):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (value, 0, 255 - value)).save(file, "JPEG", quality=95)
            blobs.append(file.getvalue())
        each = {"blob": np.frombuffer(b"".join(blobs), np.uint8), "off": np.cumsum([0, *map(len, blobs)]), "y": np.arange(3)}
        np.savez(tmp_path / "jpegs.npz", **{f"{part}_{name}": value for part in ("train", "test") for name, value in each.items()})
        (x, y), _ = load_cifar(tmp_path / "jpegs.npz", 10)
        assert y.tolist() == [0, 1, 2]
        assert np.abs(x[:, 0].astype(int).mean((1, 2)) - [10, 200, 90]).max() < 4
        assert len(load_cifar(tmp_path / "jpegs.npz", 10, 2)[0][0]) == 2

    def test_what_is_missing_says_where_to_get_it(self, tmp_path):
        with pytest.raises(Lacking, match="no CIFAR-100.*\n.*cifar-100-python.tar.gz at https://www.cs.toronto.edu"):
            load_cifar(tmp_path, 100)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "EOFError"),
            (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}), "KeyError"),
            (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 images and 1 labels"),
            (pickle.dumps(os.getcwd), "it asks for"),
        ],
    )
    def test_what_is_broken_is_named(self, folder, tmp_path, content, says):
        for file in (folder / "cifar-10-batches-py").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "data_batch_3").write_bytes(content)
        with pytest.raises(Lacking, match=f"data_batch_3.*{says}"):
            load_cifar(tmp_path, 10)

    def test_a_cut_binary_file(self, folder, tmp_path):
        for file in (folder / "cifar-100-binary").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[:-1])
        with pytest.raises(Lacking, match="24591 bytes, which is no multiple of 3074"):
            load_cifar(tmp_path, 100)


@pytest.mark.parametrize(
    ("name", "float_size", "at_four_bits", "min_size"),
    [("mobilenet", 12.27, 1.64, 2622), ("resnet18", 42.63, 5.37, 2622), ("wrn28_10", 139.2, 17.50, 2622), ("resnet20", 1.03, 0.13, 0)],
)
def test_sizes_are_those_of_the_papers_tables(name, float_size, at_four_bits, min_size):
    model = cifar.MODELS[name]()
    assert float_mib(model) == pytest.approx(float_size, abs=0.006)
    prepared = prepare(model, (torch.zeros(2, 3, 8, 8),), STE(bits=4, group_size="tensor", grid="float", min_size=min_size))
    assert model_size(prepared, exact=True) == pytest.approx(at_four_bits, abs=0.006)


class Small(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Linear(512, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(cifar.MODELS, "resnet18", Small)


def run(folder, out, *more):
    options = ("--data", folder, "--out", out, "--epochs", 1, "--batch-size", 8, "--lr", 0.01, "--min-size", 0, *more)
    return main(cifar.Cifar, [str(each) for each in options])


@pytest.mark.usefixtures("small")
class TestTraining:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_ends_with_a_score_and_a_size(self, folder, tmp_path, method):
        result = run(folder, tmp_path / "run", "--method", method, "--no-onnx", *(("--turns", 3) if method == "lc" else ()))
        assert 0 < result["size_mib"] < float_mib(Small())
        assert (tmp_path / "run" / "model.safetensors").stat().st_size == result["packed"]["mib"] * 2**20
        assert json.loads((tmp_path / "run" / "result.json").read_text()) == result

    def test_a_float_model_is_where_another_starts(self, folder, tmp_path, monkeypatch):
        run(folder, tmp_path / "float", "--method", "float")
        saved = load_file(tmp_path / "float" / "float.safetensors")
        seen = {}
        monkeypatch.setattr(Training, "run", lambda self: seen.update(self.model.state_dict()))
        run(folder, tmp_path / "lsq", "--method", "lsq", "--no-onnx", "--start", tmp_path / "float" / "float.safetensors")
        assert saved["norm.running_mean"].any()
        for name, value in saved.items():
            assert torch.equal(seen[name], value), name

    def test_distillation_follows_the_float_model_and_no_labels(self, folder, tmp_path, monkeypatch):
        run(folder, tmp_path / "float", "--method", "float")
        monkeypatch.setattr(cifar.Cifar, "criterion", lambda *args: pytest.fail("labels were used"))
        result = run(
            folder, tmp_path / "run", "--distil", "--method", "ste", "--no-onnx", "--start", tmp_path / "float" / "float.safetensors"
        )
        assert result["settings"]["distil"]
        assert result["settings"]["start"] == "float.safetensors"  # a result tells nobody's folders

    @pytest.mark.parametrize("method", ["diffq", "lsq", "lc", "float"])
    def test_resuming_gives_what_the_whole_training_gives(self, folder, tmp_path, method):
        asked = ["--data", str(folder), "--batch-size", "8", "--lr", "0.01", "--method", method, "--min-size", "0", "--ema", "0.5"]

        def training(out):
            settings = parse(cifar.CifarSettings, [*asked, "--epochs", "2", "--out", str(tmp_path / out)], "")
            return Training(cifar.Cifar(settings, torch.device("cpu")), Processes(0, 1, torch.device("cpu")))

        whole = training("whole")
        whole.run()
        for weight, average in zip(whole.optimizers.weights, whole.average.values, strict=True):
            assert torch.equal(weight, average)
        part = training("parts")
        for _ in range(3):
            part.step()
        part.save()
        rest = training("parts")
        assert rest.resumed_at == 3
        rest.run()
        for name, value in whole.model.state_dict().items():
            assert torch.equal(rest.model.state_dict()[name], value), name

    def test_the_log_for_tensorboard_has_losses_and_scores(self, folder, tmp_path):
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        run(folder, tmp_path, "--method", "lsq", "--no-onnx", "--tensorboard", "--epochs", 2)
        log = events.EventAccumulator(str(tmp_path)).Reload()
        assert {name: [each.step for each in log.Scalars(name)] for name in ("loss", "score")} == {"loss": [5, 10], "score": [5]}

    def test_the_log_for_tensorboard_needs_tensorboard(self, folder, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        with pytest.raises(SystemExit, match="pip install tensorboard"):
            run(folder, tmp_path, "--method", "lsq", "--no-onnx", "--tensorboard")

    def test_a_checkpoint_of_other_settings_is_refused(self, folder, tmp_path):
        run(folder, tmp_path, "--method", "float")
        with pytest.raises(SystemExit, match="--method was float, is ste"):
            run(folder, tmp_path, "--method", "ste")

    def test_wrong_options(self, folder, tmp_path):
        with pytest.raises(SystemExit, match="--start: there is no file nowhere"):
            run(folder, tmp_path, "--start", "nowhere")
        with pytest.raises(SystemExit, match="--distil follows a trained float model"):
            run(folder, tmp_path, "--distil")
        with pytest.raises(SystemExit, match="--group must be channel, tensor or a number from 1, got 'layer'"):
            run(folder, tmp_path, "--group", "layer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "smaller"),
    [("wrn28_10", {"depth": 10, "widen": 1}), ("vit", {"width": 32, "layers": 1, "heads": 2, "hidden": 32})],
)
def test_a_net_that_the_smoke_test_does_not_take(folder, tmp_path, monkeypatch, model, smaller):
    monkeypatch.setitem(cifar.MODELS, model, functools.partial(cifar.MODELS[model], **smaller))
    result = run(folder, tmp_path, "--model", model, "--bits", 3)
    assert result["onnx"]["score"] == result["score"]
    assert result["size_mib"] < result["float_mib"] / 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1, 59: 1, 60: 0.2, 119: 0.2, 120: 0.04, 180: 0.008, 199: 0.008}),
        ({"schedule": "cosine"}, {0: 1, 100: 0.5, 150: 0.14645}),
        ({"schedule": "cosine", "warm_up": 0.1}, {0: 1 / 21, 19: 20 / 21, 20: 1, 110: 0.5}),
        ({"schedule": "constant"}, {0: 1, 199: 1}),
    ],
)
def test_the_rate_falls_as_in_the_paper_or_along_a_cosine(settings, expected):
    training = SimpleNamespace(settings=cifar.CifarSettings(**settings), steps=200)
    assert {step: round(Training.rate(training, step), 5) for step in expected} == pytest.approx(expected, abs=1e-5)


def test_each_image_is_shifted_and_mirrored_by_itself():
    picture = torch.arange(1, 1 + 32 * 32, dtype=torch.int16).view(1, 1, 32, 32).expand(64, 3, 32, 32)
    torch.manual_seed(0)
    seen = cifar._shifted_and_mirrored(picture)
    assert seen.shape == picture.shape
    possible = {}
    padded = torch.nn.functional.pad(picture[:1], (4, 4, 4, 4))
    for top in range(9):
        for left in range(9):
            crop = padded[0, :, top : top + 32, left : left + 32]
            possible[crop.numpy().tobytes()] = possible[crop.flip(2).numpy().tobytes()] = True
    assert all(each.contiguous().numpy().tobytes() in possible for each in seen)
    assert len({each.contiguous().numpy().tobytes() for each in seen}) > 30
