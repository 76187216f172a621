"""LeNet300 on MNIST: the data, the float model, and how everybody trains."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffq_fx.training.lc import LStep

BATCH = 256
HELD_OUT = 5000
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass
class Mnist:
    """The data, and how long everybody trains."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int

    @staticmethod
    def load(folder: Path, epochs: int) -> "Mnist":
        """Read the four idx files."""
        missing = [name for name in FILES if not (folder / name).exists()]
        if missing:
            raise SystemExit(f"{folder} lacks {', '.join(missing)}: put the unpacked idx files of MNIST there.")
        images, labels, test_images, test_labels = (np.fromfile(folder / name, np.uint8) for name in FILES)

        def pixels(raw: np.ndarray) -> Tensor:
            x = torch.from_numpy(raw[16:].reshape(-1, 784).astype(np.float32)) / 255
            return x - 0.1307

        return Mnist(
            (pixels(images), torch.from_numpy(labels[8:].astype(np.int64))),
            (pixels(test_images), torch.from_numpy(test_labels[8:].astype(np.int64))),
            epochs,
        )

    def held_out(self) -> "Mnist":
        """The same without the test images: the last training images are scored on in their place, and not trained on."""
        x, y = self.train
        return Mnist((x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:]), self.epochs)

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole training."""
        return self.epochs * math.ceil(len(self.train[0]) / BATCH)

    @property
    def example(self) -> Tensor:
        """A small batch to prepare with."""
        return self.train[0][:2]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch."""
        x, y = self.train
        for batch in torch.randperm(len(x)).split(BATCH):
            yield x[batch], y[batch]

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Test error in %."""
        x, y = self.test
        return 100 * float((model.eval()(x).argmax(1) != y).double().mean())

    def float_model(self, seed: int) -> nn.Module:
        """784-300-100-10, trained from scratch."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 10))
        self.fit(model, self.epochs)
        return model

    def fit(self, model: nn.Module, epochs: int) -> None:
        """Adam, its rate falling from 1e-3 along a cosine."""
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * self.steps // self.epochs)
        model.train()
        for _ in range(epochs):
            for x, y in self.batches():
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step()

    def l_step(self, *, epochs: int = 1, first_rate: float = 0.1, decay: float = 0.95) -> Callable[[nn.Module, LStep], None]:
        """The paper's L step: SGD with momentum, a rate that falls from one to the next and stays below 1/mu."""

        def run(model: nn.Module, step: LStep) -> None:
            rate = min(first_rate * decay**step.index, step.largest_rate)
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
            model.train()
            for _ in range(epochs):
                for x, y in self.batches():
                    optimizer.zero_grad()
                    (F.cross_entropy(model(x), y) + step.penalty()).backward()
                    optimizer.step()

        return run
