"""What readers of arrays share: an npz, and images with a label each."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from recipes.common.recipe import Lacking

Part = tuple[np.ndarray, np.ndarray]
"""Images, uint8, and labels, int64, (N,)."""


def read_npz(path: Path, names: list[str]) -> list[np.ndarray]:
    """The arrays of these names."""
    try:
        archive = np.load(path)
        if lacking := set(names) - set(getattr(archive, "files", ())):
            raise Lacking(f"{path} lacks the arrays {', '.join(sorted(lacking))}: it is another npz than the one expected.")
        return [archive[name] for name in names]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as wrong:
        raise Lacking(f"{path} is no npz that can be read: {wrong}. Get it again.") from wrong


def checked(path: Path, images: np.ndarray, labels: np.ndarray, classes: int, limit: int = 0) -> Part:
    """The first ``limit`` images, or all, once every one is known to have a label of the data set."""
    if not len(images) or len(images) != len(labels):
        raise Lacking(f"{path} has {len(images)} images and {len(labels)} labels, expected as many of both. Get it again.")
    if labels.min() < 0 or labels.max() >= classes:
        raise Lacking(f"{path} has labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}. Get it again.")
    return (images[:limit], labels[:limit].astype(np.int64)) if limit else (images, labels.astype(np.int64))
