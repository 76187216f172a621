"""What is broken in data, in weights to start from, or in a checkpoint ends in one sentence that names the file."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_data import RECIPES, images, wav
from safetensors.torch import save, save_file

from recipes.common.checkpoint import read_checkpoint
from recipes.common.main import main


def jpeg(size=32):
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "JPEG")
    return file.getvalue()


SOUND = (jpeg(),) * 3


def npz_of_jpegs(folder, blobs=SOUND, labels=(0, 1, 2), cut=None):
    each = {"blob": np.frombuffer(b"".join(blobs), np.uint8), "off": np.cumsum([0, *map(len, blobs)]), "y": np.array(labels)}
    np.savez(folder / "x.npz", **{f"{part}_{name}": value for part in ("train", "test") for name, value in each.items()})
    content = (folder / "x.npz").read_bytes()
    (folder / "x.npz").write_bytes(content[:cut])
    return ["--data", folder / "x.npz"]


def write(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


def pickled(folder):
    x, _ = images(8)
    write(folder, "cifar-10-batches-py/data_batch_2", pickle.dumps({b"data": x.reshape(8, -1), b"labels": [55] * 8}))


def npz_of_stems(folder, *shape, dtype=np.int16):
    np.savez(folder / "s.npz", stems=np.zeros(shape, dtype))
    return ["--data", folder / "s.npz"]


def weights(folder, content):
    if isinstance(content, bytes):
        write(folder, "f.safetensors", content)
    else:
        save_file(content, folder / "f.safetensors")
    return ["--start", folder / "f.safetensors"]


def checkpoint(folder, content):
    path = folder / "run/checkpoint.pt"
    path.parent.mkdir()
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)


def pretrained(folder, **files):
    for name, content in files.items():
        write(folder, f"p/{name}.json", content)
    return ["--pretrained", folder / "p"]


CASES = {
    "an npz that is none": ("cifar", lambda folder: npz_of_jpegs(folder, cut=9), "x.npz is no npz that can be read"),
    "an npz that is cut": ("cifar", lambda folder: npz_of_jpegs(folder, cut=-90), "x.npz is no npz that can be read"),
    "an npz of stems": ("cifar", lambda folder: npz_of_stems(folder, 9, 4, 8), "s.npz lacks the arrays train_blob, train_off, train_y"),
    "a JPEG that is none": (
        "cifar",
        lambda folder: npz_of_jpegs(folder, (jpeg(), b"nonsense", jpeg())),
        "x.npz: train image 1 is no JPEG of 32 x 32",
    ),
    "a JPEG of another size": (
        "cifar",
        lambda folder: npz_of_jpegs(folder, (jpeg(), jpeg(16), jpeg())),
        "x.npz: train image 1 is no JPEG of 32 x 32",
    ),
    "a label too large": (
        "cifar",
        lambda folder: npz_of_jpegs(folder, labels=(0, 1, 77)),
        "x.npz has labels from 0 to 77, expected 0 to 9",
    ),
    "a label too small": ("cifar", lambda folder: npz_of_jpegs(folder, labels=(0, 1, -1)), "x.npz has labels from -1 to 1"),
    "a label too few": ("cifar", lambda folder: npz_of_jpegs(folder, labels=(0, 1)), "x.npz has 3 images and 2 labels"),
    "labels of a pickle": ("cifar", pickled, "data_batch_2 has labels from 55 to 55, expected 0 to 9"),
    "stems in float": ("separation", lambda folder: npz_of_stems(folder, 9, 4, 8, dtype=np.float32), "s.npz has stems of float32"),
    "too few stems": ("separation", lambda folder: npz_of_stems(folder, 8, 4, 16000), r"shape \(8, 4, 16000\), .* more than 8 pieces"),
    "stems too short": ("separation", lambda folder: npz_of_stems(folder, 9, 4, 8), r"s.npz: .* track 0 .*\(8, 1\).*a second or more"),
    "a mono source": (
        "separation",
        lambda folder: wav(folder / "train/b/bass.wav", np.zeros((2000, 1))),
        r"track b have .*\(2000, 1\).* as many channels as a has, 2",
    ),
    "no pairs": ("glue", lambda folder: write(folder, "train.tsv", b"sentence1\tsentence2\tgold_label\n"), "train.tsv has no pair"),
    "a tokenizer that is none": ("glue", lambda folder: pretrained(folder, tokenizer=b"{"), "tokenizer.json cannot be read"),
    "weights that are none": ("mnist", lambda folder: weights(folder, b"garbage"), "--start .*f.safetensors is no safetensors file"),
    "weights of another model": (
        "mnist",
        lambda folder: weights(folder, {"conv": torch.zeros(1)}),
        "--start .*f.safetensors has other weights.*Missing key",
    ),
    "weights that are cut": (
        "mnist",
        lambda folder: weights(folder, save({"1.bias": torch.zeros(300)})[:-9]),
        "--start .*f.safetensors is no safetensors file",
    ),
    "weights of NaN": (
        "mnist",
        lambda folder: weights(folder, {"1.bias": torch.full((300,), torch.nan)}),
        "--start .*f.safetensors has values that are not finite in 1.bias",
    ),
    "a run that is a file": ("mnist", lambda folder: write(folder, "run", b""), "--out .*run cannot be written: File exists"),
    **{
        f"a checkpoint that is {what}": (
            "mnist",
            lambda folder, content=content: checkpoint(folder, content),
            "checkpoint.pt cannot be read.*Delete it",
        )
        for what, content in {"none": b"garbage", "another dict": {"a": 1}, "a list": [1], "a folder": None}.items()
    },
}


@pytest.mark.parametrize("where", [0.25, 0.5, 0.75])
def test_a_flipped_bit_of_a_checkpoint_is_found(tmp_path, where):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": torch.ones(3000)}, path)
    device = torch.device("cpu")
    assert read_checkpoint(path, device, ["model"])["model"].sum() == 3000
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 64
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="checkpoint.pt cannot be read"):
        read_checkpoint(path, device, ["model"])


@pytest.mark.parametrize("case", CASES)
def test_it_is_named_in_one_sentence(case, tmp_path):
    name, damage, says = CASES[case]
    recipe, make = RECIPES[name]
    options = ["--data", tmp_path, "--out", tmp_path / "run", "--method", "ste", "--batch-size", 2, *make(tmp_path)]
    options += damage(tmp_path) or []
    with pytest.raises(SystemExit, match=says):
        main(recipe, [str(each) for each in options])
