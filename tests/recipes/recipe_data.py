"""A little of each recipe's data, in the format it is published in, and what a recipe is to be told with it."""

import pickle
import struct
import wave

import numpy as np
import pytest
from PIL import Image

from recipes.cifar import Cifar
from recipes.data.stems import MUSDB
from recipes.glue import Glue
from recipes.imagenet import ImageNet
from recipes.language import Language
from recipes.mnist import Mnist
from recipes.separation import Separation


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), np.uint8), rng.integers(0, 10, count)


def make_cifar(base):
    """CIFAR-10's pickles and CIFAR-100's binary files."""
    pickles, binary = base / "cifar-10-batches-py", base / "cifar-100-binary"
    pickles.mkdir()
    binary.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        x, y = images(8, number)
        (pickles / name).write_bytes(pickle.dumps({b"data": x.reshape(8, -1), b"labels": y.tolist()}))
    for name in ("train.bin", "test.bin"):
        x, y = images(8)
        (binary / name).write_bytes(np.concatenate([y[:, None] // 2, y[:, None], x.reshape(8, -1)], 1).astype(np.uint8).tobytes())
    return ["--model", "resnet20"]


def idx(values):
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()


def make_mnist(folder):
    rng = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (count, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return []


TEXT = " = Heading = \n\n the cat sat on the mat . \n the dog , unlike the cat , ran . \n"


def wav(path, samples, bits=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(bits // 8)
        file.setframerate(800)
        file.writeframes(samples.astype({8: np.uint8, 16: "<i2"}[bits]).tobytes())


def make_text(folder):
    for part, times in (("train", 40), ("test", 8)):
        (folder / f"wiki.{part}.tokens").write_text(times * TEXT, encoding="utf-8")
    return ["--context", "8"]


def make_stems(folder):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for track in "ab":
            for source in MUSDB:
                wav(folder / part / track / f"{source}.wav", rng.integers(-9000, 9000, (2000, 2)))
    return ["--seconds", "0.3"]


def make_pairs(folder):
    pytest.importorskip("transformers")
    lines = ["index\tsentence1\tsentence2\tlabel1\tgold_label"]
    for i in range(24):
        label = ("entailment", "neutral", "contradiction", "-")[i % 4]
        lines.append(f'{i}\tA "man number {i} walks .\tSomebody moves {i} times .\t{label}\t{label}')
    for name in ("train.tsv", "dev_matched.tsv"):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--width", "64", "--layers", "1", "--length", "16", "--words", "300"]


def make_pictures(folder):
    pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(("n01440764", "n01443537")):
            (folder / part / name).mkdir(parents=True)
            for i in range(10):
                shape = (40 + i, 50, 3) if i else (40, 50)  # ImageNet has grey ones, too
                Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / part / name / f"{number}_{i}.JPEG")
    return ["--tiny", "--size", "32", "--min-size", "0", "--model", "deit_b_distilled"]


RECIPES = {
    "cifar": (Cifar, make_cifar),
    "mnist": (Mnist, make_mnist),
    "language": (Language, make_text),
    "separation": (Separation, make_stems),
    "glue": (Glue, make_pairs),
    "imagenet": (ImageNet, make_pictures),
}
