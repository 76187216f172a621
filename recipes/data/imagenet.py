"""ImageNet's folders of pictures, ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``, read ahead by threads."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recipes.common.recipe import Lacking

_ENDINGS = {".jpeg", ".jpg", ".png", ".webp"}


@dataclass
class Pictures:
    """Files and the numbers of their classes."""

    files: list[Path]
    labels: np.ndarray
    classes: list[str]
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count()))

    def read(self, numbers: list[int], size: int, crops: np.ndarray | None) -> list["Future[np.ndarray]"]:
        """Begin to decode pictures, uint8, (3, size, size): random crops with four uniform numbers each, or the middle."""
        return [self._pool.submit(_decode, self.files[n], size, None if crops is None else crops[i]) for i, n in enumerate(numbers)]


def load_pictures(folder: Path, limit: int = 0) -> Pictures:
    """The pictures of one part, classes in the order of their names; the first ``limit`` of all classes in turn where that is not 0."""
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    if not classes:
        raise Lacking(
            f"{folder} has no folders of classes: expected {folder}/n01440764/*.JPEG and so on.\n"
            "  Get ILSVRC2012 at https://image-net.org and unpack train and val so; val needs its pictures sorted by class."
        )
    found = [sorted(each for each in (folder / name).iterdir() if each.suffix.lower() in _ENDINGS) for name in classes]
    if empty := [name for name, files in zip(classes, found, strict=True) if not files]:
        raise Lacking(f"{folder} has classes without a picture ({', '.join(sorted(_ENDINGS))}): {', '.join(empty[:5])}. Unpack them again.")
    pairs = [(file, number) for number, files in enumerate(found) for file in files]
    if limit:
        pairs = pairs[:: max(len(pairs) // limit, 1)][:limit]
    return Pictures([file for file, _ in pairs], np.array([number for _, number in pairs], np.int64), classes)


def _decode(path: Path, size: int, draws: np.ndarray | None) -> np.ndarray:
    """A random part of 8 to 100 % of the picture, mirrored or not (Szegedy et al., arXiv:1409.4842); or the middle 7/8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as wrong:
        raise Lacking(f"{path} is no picture that can be read: {wrong}. Unpack it again.") from wrong
    width, height = picture.size
    if draws is None:
        side = min(width, height) * 7 / 8
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:
        area, ratio = width * height * (0.08 + 0.92 * draws[0]), np.exp(np.log(4 / 3) * (2 * draws[1] - 1))
        w, h = min((area * ratio) ** 0.5, width), min((area / ratio) ** 0.5, height)
        left, top = (width - w) * draws[2], (height - h) * (draws[3] * 2 % 1)
        box = (left, top, left + w, top + h)
    array = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)
    return array[:, :, ::-1] if draws is not None and draws[3] < 0.5 else array
