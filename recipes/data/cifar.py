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
from recipes.data.arrays import Part, checked, read_npz

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
        return _jpegs(path, "train", classes, limit), _jpegs(path, "test", classes, limit)
    for kind, read in ((_PICKLES, _pickled), (_BINARY, _binary)):
        name, train, test, extra = kind[classes]
        for folder in (path, path / name):
            if all((folder / each).is_file() for each in (*train, test)):
                parts = [checked(folder / each, *read(folder / each, extra), classes) for each in train]
                images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
                return checked(folder, images, labels, classes, limit), checked(folder / test, *read(folder / test, extra), classes, limit)
    archive = "cifar-10-python.tar.gz" if classes == 10 else "cifar-100-python.tar.gz"
    raise Lacking(
        f"--data {path} holds no CIFAR-{classes}: expected {_PICKLES[classes][0]}/, {_BINARY[classes][0]}/, or an npz of JPEGs.\n"
        f"  Get {archive} at https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there."
    )


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
            return images, np.asarray(read[labels], np.int64)
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, IndexError) as wrong:
            raise Lacking(f"{path} is no batch of CIFAR: {type(wrong).__name__}: {wrong}. Unpack the archive again.") from wrong


def _binary(path: Path, labels: int) -> Part:
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % (labels + _PIXELS):
        raise Lacking(f"{path} has {len(raw)} bytes, which is no multiple of {labels + _PIXELS}. Unpack the archive again.")
    rows = raw.reshape(-1, labels + _PIXELS)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1]


def _jpegs(path: Path, part: str, classes: int, limit: int) -> Part:
    """Train or test of an npz with ``<part>_blob``, ``<part>_off`` and ``<part>_y``: JPEGs in one row, where each begins, labels."""
    if importlib.util.find_spec("PIL") is None:
        raise Lacking("Images in JPEG need pillow: pip install pillow.")
    from PIL import Image

    row, edges, labels = read_npz(path, [f"{part}_{each}" for each in ("blob", "off", "y")])
    blob, count = row.tobytes(), min(len(edges) - 1, limit or len(edges))
    images = np.empty((count, 32, 32, 3), np.uint8)

    def decode(numbers: range) -> None:
        for i in numbers:
            try:
                images[i] = np.asarray(Image.open(io.BytesIO(blob[edges[i] : edges[i + 1]])))
            except (OSError, ValueError) as wrong:
                raise Lacking(f"{path}: {part} image {i} is no JPEG of 32 x 32 colours: {wrong}. Get it again.") from wrong

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, (range(i, min(i + 500, count)) for i in range(0, count, 500))))
    return checked(path, images.transpose(0, 3, 1, 2), labels[:limit] if limit else labels, classes)
