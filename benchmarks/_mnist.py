"""LeNet300 on MNIST, both the recipe's, and how everybody trains."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffq_fx.training.lc import LStep
from recipes.mnist import Mnist as MnistRecipe
from recipes.mnist import MnistSettings
from recipes.models.mnist import lenet300

BATCH = 256
HELD_OUT = 5000


@dataclass
class Mnist:
    """The data, and how long everybody trains."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int

    @staticmethod
    def load(folder: Path, epochs: int) -> "Mnist":
        """The recipe's images."""
        recipe = MnistRecipe(MnistSettings(data=folder), torch.device("cpu"))
        train, test = ((recipe.normalized(x), y) for x, y in (recipe.train, recipe.test))
        return Mnist(train, test, epochs)

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
        """Trained from scratch."""
        torch.manual_seed(seed)
        model = lenet300()
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
