"""MNIST: LeNet300 and LeNet5, and learning-compression (LC, arXiv:1707.04319) with all its codebooks.

    python -m recipes.mnist --data DIR --method float --out runs/float
    python -m recipes.mnist --data DIR --method lc --codebook adaptive --bits 1 --start runs/float/float.safetensors --out runs/lc2
    python -m recipes.mnist --data DIR --method lc --codebook scaled_ternary --start runs/float/float.safetensors --out runs/ternary

DIR holds the four idx files of MNIST, unpacked or as .gz. The LC authors' own schedule for LeNet300 is
`--epochs 820 --turns 40 --mu-start 9e-5 --mu-end 3.7e-3 --lr 0.09 --schedule steps --drop-every 0.025 --drop-by 0.98`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from recipes.common.images import Images
from recipes.common.main import main
from recipes.common.recipe import Batch
from recipes.common.settings import Settings
from recipes.data.mnist import load_mnist
from recipes.models.mnist import lenet5, lenet300

MODELS: dict[str, Callable[[], nn.Module]] = {"lenet300": lenet300, "lenet5": lenet5}
_MEAN = 0.1307


@dataclass(kw_only=True)
class MnistSettings(Settings):
    """Adam with a rate that falls along a cosine; LC by SGD with Nesterov momentum, as its authors have it."""

    model: Literal["lenet300", "lenet5"] = "lenet300"
    """The net."""
    epochs: float = 20
    """Length of the training."""
    batch_size: int = 256
    """Of all processes together."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    """Of the weights; sgd has Nesterov momentum."""
    lr: float = 1e-3
    """Learning rate of the weights at the start."""

    @classmethod
    def preset(cls, model: str, method: str) -> dict[str, Any]:
        """LC's optimizer."""
        lc = {"optimizer": "sgd", "lr": 0.1, "schedule": "steps", "drop_every": 0.05, "drop_by": 0.95, "turns": 20, "mu_end": 30.0}
        return lc if method == "lc" else {}


class Mnist(Images[MnistSettings]):
    """Test error of two small nets."""

    name, score_name, higher_is_better = "mnist", "test error in %", False
    settings_type: ClassVar = MnistSettings

    def load(self) -> None:
        """The images as bytes on the device."""
        parts = load_mnist(self.settings.data, self.settings.limit)
        self.train, self.test = ((torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)) for x, y in parts)

    def make_model(self) -> nn.Module:
        """The net."""
        return MODELS[self.settings.model]()

    def take(self, pick: Tensor) -> Batch:
        """Images as they are."""
        return (self.normalized(self.train[0][pick]),), self.train[1][pick]

    def normalized(self, images: Tensor) -> Tensor:
        """Bytes as numbers about zero."""
        return images.unsqueeze(1).float() / 255 - _MEAN

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Error."""
        return {"score": 100 * float((torch.cat(outputs).argmax(1) != torch.cat(targets)).double().mean())}


if __name__ == "__main__":
    main(Mnist)
