"""CIFAR-10, ResNet-20. The images are JPEG, which costs published models about 10 points."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.frontier.tasks.base import Batch, Inputs, Task
from benchmarks.frontier.training import Tell
from recipes.cifar import Cifar, CifarSettings


class Cifar10(Task):
    """ResNet-20 on 50,000 + 10,000 images of 32x32 (as JPEG); the float model is read."""

    name, score_name = "cifar10", "test accuracy in %"
    has_convolutions = True
    files = ("cifar10_jpeg.npz", "resnet20_cifar10_float.safetensors")
    steps, rate = 200, 1e-3
    penalties: ClassVar[dict[int, float]] = {2: 50.0, 3: 10.0, 4: 3.0}

    def load(self, folder: Path) -> None:
        """The recipe's images."""
        settings = CifarSettings(data=folder / self.files[0], model="resnet20", normalization="imagenet", limit=100 if self.quick else 0)
        self.recipe = Cifar(settings, torch.device("cpu"))

    def make_float_model(self, folder: Path, tell: Tell) -> nn.Module:
        """Read it."""
        from safetensors.torch import load_file

        model = self.recipe.make_model()
        model.load_state_dict(load_file(folder / self.files[1]))
        return model

    def batches(self, seed: int) -> Iterator[Batch]:
        """128 images, all shifted by the same up to 4 pixels, half of them mirrored."""
        generator = torch.Generator().manual_seed(seed)
        x, y = self.recipe.train
        while True:
            for pick in torch.randperm(len(x), generator=generator).split(128):
                padded = F.pad(x[pick].float(), (4, 4, 4, 4))
                top, left = (int(n) for n in torch.randint(9, (2,), generator=generator))
                cropped = padded[:, :, top : top + 32, left : left + 32]
                flipped = torch.where(torch.rand(len(pick), 1, 1, 1, generator=generator) < 0.5, cropped, cropped.flip(3))
                yield (self.recipe.normalized(flipped),), y[pick]

    def unlabelled(self) -> list[Inputs]:
        """500 images as they are, evenly from the training set."""
        images = self.recipe.train[0][:: max(len(self.recipe.train[0]) // 500, 1)][:500]
        return [(self.recipe.normalized(each),) for each in images.split(50)]

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return self.recipe.criterion(output, target)

    def test_batches(self) -> Iterator[Batch]:
        """All test images."""
        return self.recipe.test_batches()

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Accuracy."""
        return self.recipe.summarize(outputs, targets)
