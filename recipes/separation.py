"""Music source separation: Demucs on MUSDB18, or a small one on rendered stems.

    python -m recipes.separation --data musdb18hq --model demucs --method diffq-paper --penalty 3e-4 --out runs/demucs
    python -m recipes.separation --data stems.npz --model small --method diffq --bits 3 --out runs/small

The loss is the mean absolute error of the waveforms. The score is the SDR of museval (BSSEval v4): the median over tracks of the median
over windows of one second, each 10 log10(sum s^2 / sum (s - estimate)^2), and of these the mean over the sources.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from recipes.common.main import main
from recipes.common.recipe import Batch, Recipe
from recipes.common.settings import Settings
from recipes.data.stems import Track, load_stems
from recipes.models.separation import Demucs

_SIZES = {"demucs": {"width": 64, "depth": 6}, "small": {"width": 24, "depth": 3}}
_LONGEST_TEST = 10
"""Seconds that are separated at once."""


@dataclass(kw_only=True)
class SeparationSettings(Settings):
    """Adam, as Demucs has it."""

    model: Literal["demucs", "small"] = "small"
    """The net."""
    seconds: float = 1.0
    """Length of a training example; rounded up to what the net takes."""
    epochs: float = 50
    """Length of the training; an epoch has every second of the training tracks about once."""
    batch_size: int = 8
    """Of all processes together."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    """Of the weights."""
    lr: float = 1e-3
    """Learning rate of the weights at the start."""

    @classmethod
    def preset(cls, model: str, method: str) -> dict[str, Any]:
        """The public Demucs: weights of less than 1 MiB stay in float."""
        large = {"lr": 3e-4, "batch_size": 64, "epochs": 180, "seconds": 10.0, "schedule": "constant", "min_size": 2**18}
        return large if model == "demucs" else {}


class Separation(Recipe[SeparationSettings]):
    """SDR of the separated sources."""

    name, score_name = "separation", "SDR in dB"
    settings_type: ClassVar = SeparationSettings

    def load(self) -> None:
        """The tracks, on disk where they are files; the test in pieces of at most ten seconds."""
        settings = self.settings
        self.train, test, self.rate = load_stems(settings.data, settings.limit)
        self.sources, self.channels = len(self.train[0].sources), self.train[0].sources[0].shape[1]
        multiple = 4 ** _SIZES[settings.model]["depth"]
        self.length = -(-int(settings.seconds * self.rate) // multiple) * multiple
        longest = min(_LONGEST_TEST, 1 if settings.limit else _LONGEST_TEST) * self.rate
        self.windows, self.padded = longest // self.rate, -(-longest // multiple) * multiple
        ends = [self.rate * self.windows if settings.limit else len(track) for track in test]
        self.pieces = [(track, start) for track, end in zip(test, ends, strict=True) for start in range(0, end, longest)]

    def make_model(self) -> nn.Module:
        """Demucs for the sources and channels of the data."""
        return Demucs(self.sources, self.channels, **_SIZES[self.settings.model])

    @property
    def examples(self) -> int:
        """Seconds of all tracks, or a few."""
        return self.settings.limit or max(sum(len(track) for track in self.train) // self.rate, 1)

    def take(self, pick: Tensor) -> Batch:
        """Random parts; in half of them every source comes from another track (as Demucs remixes), each with its own level and sign."""
        stems = np.stack([[self._random_part(source) for source in range(self.sources)] for _ in pick])
        target = torch.from_numpy(stems).to(self.device)
        order = torch.stack([torch.randperm(len(pick)) for _ in range(self.sources)], 1)
        order[::2] = torch.arange(len(pick))[::2, None]
        target = target[order.to(self.device), torch.arange(self.sources, device=self.device)]
        levels = (0.25 + torch.rand(len(pick), self.sources, 1, 1)) * (torch.randint(2, (len(pick), self.sources, 1, 1)) * 2 - 1)
        target = target * levels.to(self.device)
        return (target.sum(1),), target

    def _random_part(self, source: int) -> np.ndarray:
        track = self.train[int(torch.randint(len(self.train), ()))]
        return track.part(source, int(torch.randint(max(len(track) - self.length, 0) + 1, ())), self.length)

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean absolute error of the waveform."""
        return (output - target).abs().mean()

    def test_batches(self) -> Iterator[Batch]:
        """The test tracks, two pieces at a time."""
        for i in range(0, len(self.pieces), 2):
            target = torch.from_numpy(np.stack([self._whole(*piece) for piece in self.pieces[i : i + 2]])).to(self.device)
            yield (target.sum(1),), target

    def _whole(self, track: Track, start: int) -> np.ndarray:
        return np.stack([track.part(source, start, self.padded) for source in range(self.sources)])

    def reduce(self, output: Tensor, target: Tensor) -> Tensor:
        """SDR of each window of a second, shape (N, sources, windows)."""
        return sdr(output, target, self.rate, self.windows)

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Medians over the whole windows of a track, then over tracks, then the mean over sources."""
        of_tracks: dict[str, list[Tensor]] = {}
        for (track, start), values in zip(self.pieces, torch.cat(outputs), strict=True):
            of_tracks.setdefault(track.name, []).append(values[:, : (len(track) - start) // self.rate])
        of_sources = _median(torch.stack([_median(torch.cat(each, 1)) for each in of_tracks.values()], 1))
        return {"score": float(of_sources.mean()), **{f"source {i}": float(each) for i, each in enumerate(of_sources)}}


def _median(values: Tensor) -> Tensor:
    """Over the last dimension without NaN; of an even number the mean of the two in the middle."""
    return values.nanquantile(0.5, -1)


def sdr(estimate: Tensor, target: Tensor, rate: int, windows: int) -> Tensor:
    """``10 log10(sum s^2 / sum (s - estimate)^2)`` over channels and samples of each window of a second (BSSEval v4).

    As in museval, all sources of a window have NaN where the channels of one source or estimate add up to silence.

    Example:
        >>> target = torch.ones(1, 1, 1, 4)
        >>> sdr(0.5 * target, target, 2, 2)
        tensor([[[6.0206, 6.0206]]])
    """

    def framed(x: Tensor) -> Tensor:
        return x[..., : rate * windows].unflatten(-1, (windows, rate))

    def energy(x: Tensor) -> Tensor:
        return framed(x).square().sum((2, 4))

    silent = [~framed(x).sum(2).any(-1) for x in (target, estimate)]
    found = 10 * torch.log10(energy(target) / energy(target - estimate))
    return found.masked_fill((silent[0] | silent[1]).any(1, keepdim=True), torch.nan)


if __name__ == "__main__":
    main(Separation)
