"""CIFAR-10 and CIFAR-100 by the schedule of the DiffQ paper's public experiments.

    python -m recipes.cifar --data DIR --model resnet18 --method float --out runs/float
    python -m recipes.cifar --data DIR --model resnet18 --method diffq --bits 4 --out runs/diffq4
    torchrun --nproc-per-node 8 -m recipes.cifar --data DIR --model wrn28_10 --method diffq --mib 17.5 --out runs/wrn

DIR holds the pickles or the binary files of CIFAR as they unpack; an npz of JPEGs is read too. The images are kept on the device and
augmented there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.images import Images
from recipes.common.main import main
from recipes.common.recipe import Batch
from recipes.common.settings import Settings
from recipes.data.cifar import load_cifar
from recipes.models.cifar import MobileNet, ResNet18, ResNet20, ViT, WideResNet

MODELS: dict[str, type[nn.Module]] = {
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "mobilenet": MobileNet,
    "wrn28_10": WideResNet,
    "vit": ViT,
}
_STATISTICS = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(kw_only=True)
class CifarSettings(Settings):
    """The paper's: SGD with Nesterov momentum, a rate of 0.1 that falls to a fifth at 30, 60 and 90 % of the training."""

    model: Literal["resnet18", "resnet20", "mobilenet", "wrn28_10", "vit"] = "resnet18"
    """The net."""
    classes: Literal["10", "100"] = "10"
    """CIFAR-10 or CIFAR-100."""
    normalization: Literal["cifar", "imagenet"] = "cifar"
    """Whose mean and deviation images are normalized by."""
    min_size: int = 2622
    """Weights with fewer elements stay in float: the paper's 0.01 MiB."""
    epochs: float = 200
    """Length of the training; the schedule stretches with it."""
    weight_decay: float = 5e-4
    """Of the weights."""
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    """How the learning rate falls."""
    clip_norm: float = 5.0
    """Largest norm of the gradients; 0 for none."""

    @classmethod
    def preset(cls, model: str, method: str) -> dict[str, Any]:
        """The paper's settings for ResNet-20; the transformer, which SGD does not train from scratch, by AdamW."""
        if model == "resnet20":
            bits = {"bits_lr": 2e-5, "group": "16", "penalty": 10.0} if method == "diffq-paper" else {}
            return {"epochs": 600, "drop_every": 1 / 3, "drop_by": 0.1, "weight_decay": 2e-4, "min_size": 0, **bits}
        if model == "vit":
            return {"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.05, "schedule": "cosine", "warm_up": 0.05}
        return {"group": "16"} if method == "diffq-paper" else {}


class Cifar(Images[CifarSettings]):
    """Test accuracy of nets for images of 32x32."""

    name, score_name = "cifar", "test accuracy in %"
    settings_type: ClassVar = CifarSettings

    def load(self) -> None:
        """The images as bytes on the device: 184 MB."""
        train, test = load_cifar(self.settings.data, int(self.settings.classes), self.settings.limit)
        self.train, self.test = (tuple(torch.from_numpy(each.copy()).to(self.device) for each in part) for part in (train, test))
        mean, std = (torch.tensor(each, device=self.device).view(3, 1, 1) * 255 for each in _STATISTICS[self.settings.normalization])
        self.mean, self.std = mean, std

    def make_model(self) -> nn.Module:
        """The net, in channels_last."""
        return MODELS[self.settings.model](int(self.settings.classes)).to(memory_format=torch.channels_last)

    def take(self, pick: Tensor) -> Batch:
        """Images, each shifted by up to 4 pixels and half of them mirrored."""
        return (self.normalized(_shifted_and_mirrored(self.train[0][pick])),), self.train[1][pick]

    def normalized(self, images: Tensor) -> Tensor:
        """By mean and deviation, in channels_last."""
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Accuracy."""
        return {"score": 100 * float((torch.cat(outputs).argmax(1) == torch.cat(targets)).double().mean())}


def _shifted_and_mirrored(images: Tensor) -> Tensor:
    """A crop of its own for each image out of a margin of 4 black pixels, and a mirror for half of them, in one gather."""
    n, device = len(images), images.device
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), device=device)
    line = torch.arange(32, device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, line, 31 - line) + left
    rows = line + top
    return padded[torch.arange(n, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


if __name__ == "__main__":
    main(Cifar)
