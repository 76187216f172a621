"""CIFAR-10 and CIFAR-100: the Python pickles, the binary files, or an npz of JPEGs."""

import importlib.util
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.recipe import Lacking

Part = tuple[np.ndarray, np.ndarray]
"""Images, uint8, (N, 3, 32, 32), and labels, int64, (N,)."""
_PIXELS = 3 * 32 * 32
_PICKLES = {10: ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels")}
_PICKLES[100] = ("cifar-100-python", ["train"], "test", b"fine_labels")
_BINARY = {10: ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 1)}
_BINARY[100] = ("cifar-100-binary", ["train.bin"], "test.bin", 2)


def load_cifar(path: Path, classes: int, limit: int = 0) -> tuple[Part, Part]:
    """Training and test part, the first ``limit`` images of each where that is not 0.

    Args:
        path: a folder with the files, or with the folder that the archive unpacks to, or the npz.
        classes: 10 or 100.
        limit: 0 for all.
    """
    if path.is_file() and path.suffix == ".npz":
        return load_jpegs(path, "train", limit), load_jpegs(path, "test", limit)
    for kind, read in ((_PICKLES, _pickled), (_BINARY, _binary)):
        name, train, test, extra = kind[classes]
        for folder in (path, path / name):
            if all((folder / each).is_file() for each in (*train, test)):
                parts = [read(folder / each, extra) for each in train]
                whole = tuple(np.concatenate(each) for each in zip(*parts, strict=True))
                return _first(whole, limit), _first(read(folder / test, extra), limit)
    archive = "cifar-10-python.tar.gz" if classes == 10 else "cifar-100-python.tar.gz"
    raise Lacking(
        f"--data {path} holds no CIFAR-{classes}: expected {_PICKLES[classes][0]}/, {_BINARY[classes][0]}/, or an npz of JPEGs.\n"
        f"  Get {archive} at https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there."
    )


def _first(part: Any, limit: int) -> Part:
    return (part[0][:limit], part[1][:limit]) if limit else part


class _Plain(pickle.Unpickler):
    """Reads what the pickles of CIFAR are made of, arrays and numbers, and no other object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        if (module, name) == ("numpy._core.multiarray", "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _pickled(path: Path, labels: bytes) -> Part:
    with path.open("rb") as file:
        try:
            read = _Plain(file, encoding="bytes").load()
            images = np.asarray(read[b"data"], np.uint8).reshape(-1, 3, 32, 32)
            return images, _checked(path, images, np.asarray(read[labels], np.int64))
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, IndexError) as wrong:
            raise Lacking(f"{path} is no batch of CIFAR: {type(wrong).__name__}: {wrong}. Unpack the archive again.") from wrong


def _binary(path: Path, labels: int) -> Part:
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % (labels + _PIXELS):
        raise Lacking(f"{path} has {len(raw)} bytes, which is no multiple of {labels + _PIXELS}. Unpack the archive again.")
    rows = raw.reshape(-1, labels + _PIXELS)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].astype(np.int64)


def _checked(path: Path, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if len(images) != len(labels):
        raise Lacking(f"{path} has {len(images)} images and {len(labels)} labels. Unpack the archive again.")
    return labels


def load_jpegs(path: Path, part: str, limit: int = 0) -> Part:
    """Read train or test of an npz with ``<part>_blob``, ``<part>_off`` and ``<part>_y``: JPEGs in one row, where each begins, labels."""
    if importlib.util.find_spec("PIL") is None:
        raise Lacking("Images in JPEG need pillow: pip install pillow.")
    from PIL import Image

    archive = np.load(path)
    if missing := {f"{part}_{each}" for each in ("blob", "off", "y")} - set(archive.files):
        raise Lacking(f"{path} lacks {', '.join(sorted(missing))}: it is no npz of JPEGs.")
    blob, edges = archive[f"{part}_blob"].tobytes(), archive[f"{part}_off"]
    edges = edges[: limit + 1] if limit else edges
    images = np.empty((len(edges) - 1, 32, 32, 3), np.uint8)

    def decode(numbers: range) -> None:
        for i in numbers:
            images[i] = np.asarray(Image.open(io.BytesIO(blob[edges[i] : edges[i + 1]])))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, (range(i, min(i + 500, len(images))) for i in range(0, len(images), 500))))
    return images.transpose(0, 3, 1, 2), archive[f"{part}_y"][: len(images)].astype(np.int64)
