"""CIFAR-10, ResNet-20. The images are JPEG, which costs published models about 10 points."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.frontier.tasks.base import Batch, Inputs, Task
from benchmarks.frontier.training import Tell
from recipes.data.cifar import load_jpegs
from recipes.models.cifar import ResNet20


class Cifar10(Task):
    """ResNet-20 on 50,000 + 10,000 images of 32x32 (as JPEG); the float model is read."""

    name, score_name = "cifar10", "test accuracy in %"
    has_convolutions = True
    files = ("cifar10_jpeg.npz", "resnet20_cifar10_float.safetensors")
    steps, rate = 200, 1e-3
    penalties: ClassVar[dict[int, float]] = {2: 50.0, 3: 10.0, 4: 3.0}
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def load(self, folder: Path) -> None:
        """Decode the images."""
        limits = (256, 100) if self.quick else (0, 0)
        path = folder / self.files[0]
        self.train, self.test = (
            (torch.from_numpy(images).contiguous(), torch.from_numpy(labels))
            for images, labels in (load_jpegs(path, part, limit) for part, limit in zip(("train", "test"), limits, strict=True))
        )

    def make_float_model(self, folder: Path, tell: Tell) -> nn.Module:
        """Read it."""
        from safetensors.torch import load_file

        model = ResNet20()
        model.load_state_dict(load_file(folder / self.files[1]))
        return model.to(memory_format=torch.channels_last)

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def batches(self, seed: int) -> Iterator[Batch]:
        """128 images, shifted by up to 4 pixels and mirrored."""
        generator = torch.Generator().manual_seed(seed)
        x, y = self.train
        while True:
            for pick in torch.randperm(len(x), generator=generator).split(128):
                padded = F.pad(x[pick].float(), (4, 4, 4, 4))
                top, left = (int(n) for n in torch.randint(9, (2,), generator=generator))
                cropped = padded[:, :, top : top + 32, left : left + 32]
                flipped = torch.where(torch.rand(len(pick), 1, 1, 1, generator=generator) < 0.5, cropped, cropped.flip(3))
                yield (self._normalised(flipped),), y[pick]

    def unlabelled(self) -> list[Inputs]:
        """500 images as they are, evenly from the training set."""
        images = self.train[0][:: max(len(self.train[0]) // 500, 1)][:500]
        return [(self._normalised(each),) for each in images.split(50)]

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(output, target)

    def test_batches(self) -> Iterator[Batch]:
        """All test images."""
        size = min(500, len(self.test[1]))
        for x, y in zip(self.test[0].split(size), self.test[1].split(size), strict=True):
            yield (self._normalised(x),), y

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Accuracy."""
        return {"score": 100 * float((torch.cat(outputs).argmax(1) == torch.cat(targets)).double().mean())}
