"""Source separation of rendered chorales."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._models import Separator
from benchmarks.frontier.tasks.base import Batch, Inputs, Task
from benchmarks.frontier.training import Tell
from recipes.data.stems import load_stems

_SCALE = 8192.0
"""int16 of the stems to about unit variance of the mixture."""


class SeparatorTask(Task):
    """A small separator of Demucs's kind (convolutions, LSTM, skips) on 4 instruments at 16 kHz: 32 chorales to train, 8 to test."""

    name, score_name = "separator", "SDR in dB"
    has_convolutions = True
    files = ("bach_stems_16k.npz",)
    steps, rate = 350, 1e-3
    penalties: ClassVar[dict[int, float]] = {2: 5.0, 3: 1.0, 4: 0.3}
    float_steps, float_rate = 2000, 2e-3
    segment = 16384

    def load(self, folder: Path) -> None:
        """Read the stems."""
        parts = load_stems(folder / self.files[0])[:2]
        self.train, test = (torch.from_numpy(np.stack([np.stack(track.sources) for track in part])[..., 0]) for part in parts)
        self.test = (test[-2:, :, : self.segment] if self.quick else test).float() / _SCALE

    def make_float_model(self, folder: Path, tell: Tell) -> nn.Module:
        """Trained here once."""
        torch.manual_seed(0)
        return self.train_once(Separator(sources=4, width=24, depth=3), tell)

    def batches(self, seed: int) -> Iterator[Batch]:
        """8 mixtures of a second; in half of them every instrument comes from another piece (as Demucs remixes), each at its own level."""
        generator = torch.Generator().manual_seed(seed)
        count, sources, length = self.train.shape

        def draw(limit: int) -> int:
            return int(torch.randint(limit, (1,), generator=generator))

        def stem(piece: int, source: int, start: int) -> Tensor:
            return self.train[piece, source, start : start + self.segment]

        while True:
            mixtures = []
            for number in range(8):
                piece, start = draw(count), draw(length - self.segment)
                if number % 2:
                    parts = [stem(draw(count), source, draw(length - self.segment)) for source in range(sources)]
                else:
                    parts = [stem(piece, source, start) for source in range(sources)]
                mixtures.append(torch.stack(parts).float())
            levels = 0.5 + torch.rand(8, sources, 1, generator=generator)
            target = torch.stack(mixtures) / _SCALE * levels
            yield (target.sum(1, keepdim=True),), target

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean absolute error of the waveform, as Demucs has it."""
        return (output - target).abs().mean()

    def test_batches(self) -> Iterator[Batch]:
        """The held-out chorales, whole."""
        for target in self.test.split(2):
            yield (target.sum(1, keepdim=True),), target

    def calibration(self) -> Iterator[Inputs]:
        """Whole chorales, as the test has them."""
        length = self.test.shape[-1]
        while True:
            for stems in self.train[..., :length].split(2):
                yield ((stems.float() / _SCALE).sum(1, keepdim=True),)

    def reduce(self, output: Tensor, target: Tensor) -> Tensor:
        """SDR of each piece and source: ``10 log10(sum s^2 / sum (s - estimate)^2)``."""
        tiny = 1e-8
        return 10 * torch.log10((target.square().sum(-1) + tiny) / ((target - output).square().sum(-1) + tiny))

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Mean over pieces and sources."""
        return {"score": float(torch.cat(outputs).double().mean())}
