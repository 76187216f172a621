"""A byte-level language model on six novels."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._models import Transformer
from benchmarks.frontier.tasks.base import Batch, Task
from benchmarks.frontier.training import Tell


class Text(Task):
    """A 6-layer transformer, 128 wide, on bytes of austen.txt: trained on the first 90 %, tested on 76,200 bytes of the last 5 %."""

    name, score_name = "text", "perplexity per byte"
    higher_is_better = False
    files = ("austen.txt",)
    steps, rate = 200, 1e-3
    penalties: ClassVar[dict[int, float]] = {2: 5.0, 3: 1.0, 4: 0.3}
    float_steps, float_rate = 2000, 3e-3
    context = 128

    def load(self, folder: Path) -> None:
        """Read the bytes and split them by position."""
        raw = torch.from_numpy(np.frombuffer((folder / self.files[0]).read_bytes(), np.uint8).copy()).long()
        self.train = raw[: int(0.9 * len(raw))]
        rows = 20 if self.quick else 600
        start = int(0.95 * len(raw))
        self.test = raw[start : start + rows * (self.context + 1)].view(rows, self.context + 1)

    def make_float_model(self, folder: Path, tell: Tell) -> nn.Module:
        """Trained here once."""
        torch.manual_seed(0)
        model = Transformer(256, 128, 4, 6, causal=True, context=self.context)
        for each in (model.embedding, model.position, model.head):
            nn.init.normal_(each.weight, 0, 0.02)
        for layer in model.layers:
            for projection in (layer.out, layer.down):
                nn.init.normal_(projection.weight, 0, 0.02)
        return self.train_once(model, tell)

    def batches(self, seed: int) -> Iterator[Batch]:
        """16 pieces of 128 bytes."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - self.context - 1, (16,), generator=generator)
            rows = torch.stack([self.train[s : s + self.context + 1] for s in starts.tolist()])
            yield (rows[:, :-1],), rows[:, 1:]

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy per byte."""
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def test_batches(self) -> Iterator[Batch]:
        """All test pieces."""
        for rows in self.test.split(20):
            yield (rows[:, :-1],), rows[:, 1:]

    def reduce(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return self.criterion(output, target)

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Perplexity."""
        return {"score": math.exp(float(torch.stack(outputs).double().mean()))}
