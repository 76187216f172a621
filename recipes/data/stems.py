"""Music in stems: folders of WAV files as MUSDB18-HQ has them, or an npz of rendered stems."""

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.common.recipe import Lacking
from recipes.data.arrays import read_npz

MUSDB = ("drums", "bass", "other", "vocals")
_HELD_OUT = 8


@dataclass
class Track:
    """One piece: int16, shape (samples, channels) for each source, in memory or on disk."""

    name: str
    sources: Sequence[np.ndarray]

    def part(self, source: int, start: int, length: int) -> np.ndarray:
        """float32 from -1 to 1, shape (channels, length); zeros after the end."""
        piece = self.sources[source][start : start + length].astype(np.float32).T / 32768
        return np.pad(piece, ((0, 0), (0, length - piece.shape[1])))

    def __len__(self) -> int:
        return min(len(each) for each in self.sources)


def load_stems(path: Path, limit: int = 0) -> tuple[list[Track], list[Track], int]:
    """Tracks to train on, tracks to test on, samples a second.

    Args:
        path: a folder with ``train/TRACK/drums.wav`` (bass, other, vocals) and ``test/``; or an npz with ``stems``, int16, shape
            (pieces, instruments, samples) at 16 kHz, of which the last 8 are the test.
        limit: so many tracks of each; 0 for all.
    """
    if path.is_file() and path.suffix == ".npz":
        (stems,) = read_npz(path, ["stems"])
        if stems.ndim != 3 or stems.dtype != np.int16 or len(stems) <= _HELD_OUT:
            expected = f"expected int16 of shape (pieces, instruments, samples) with more than {_HELD_OUT} pieces"
            raise Lacking(f"{path} has stems of {stems.dtype} and shape {stems.shape}, {expected}.")
        tracks = [Track(str(i), [source[:, None] for source in piece]) for i, piece in enumerate(stems)]
        parts, rate = (tracks[:-_HELD_OUT], tracks[-_HELD_OUT:]), 16_000
    else:
        rates: set[int] = set()
        parts = tuple(_tracks(path / part, rates) for part in ("train", "test"))
        if len(rates) != 1:
            raise Lacking(f"the files in {path} have different samples a second: {sorted(rates)}. Resample them.")
        rate = rates.pop()
    train, test = (part[:limit] if limit else part for part in parts)
    for track in (*train, *test):
        if len(track) < rate or len({source.shape[1] for source in (*track.sources, *train[0].sources)}) > 1:
            shapes = ", ".join(str(source.shape) for source in track.sources)
            raise Lacking(
                f"{path}: the sources of track {track.name} have (samples, channels) {shapes}, expected a second or more, and as "
                f"many channels as {train[0].name} has, {train[0].sources[0].shape[1]}."
            )
    return train, test, rate


def _tracks(folder: Path, rates: set[int]) -> list[Track]:
    folders = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    if not folders:
        raise Lacking(
            f"{folder} has no folders of tracks: expected {folder}/TRACK/{', '.join(MUSDB)}.wav.\n"
            "  Get MUSDB18-HQ at https://zenodo.org/records/3338373 and unpack it there; `musdbconvert` of the package musdb makes such\n"
            "  folders of the compressed MUSDB18."
        )
    return [Track(each.name, [_wav(each / f"{source}.wav", rates) for source in MUSDB]) for each in folders]


def _wav(path: Path, rates: set[int]) -> np.ndarray:
    """The samples, left on disk."""
    if not path.is_file():
        raise Lacking(f"there is no {path}: every track has {', '.join(f'{source}.wav' for source in MUSDB)}. Unpack the archive again.")
    try:
        with path.open("rb") as raw, wave.open(raw) as file:
            if file.getsampwidth() != 2:
                raise Lacking(f"{path} has {8 * file.getsampwidth()} bits a sample, expected 16. Convert it: sox IN.wav -b 16 OUT.wav.")
            rates.add(file.getframerate())
            shape, begin = (file.getnframes(), file.getnchannels()), raw.tell()
        return np.memmap(path, "<i2", "r", begin, shape)
    except (wave.Error, EOFError, ValueError, OSError) as wrong:
        raise Lacking(f"{path} is no WAV file of 16-bit samples: {wrong}. Unpack the archive again.") from wrong
