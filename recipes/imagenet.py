"""ImageNet: EfficientNet-B3 and DeiT-B, in mixed precision, with a moving average of the weights and DeiT's distillation token.

    python -m recipes.imagenet --data imagenet --model deit_b --start deit_b.safetensors --method diffq-paper --penalty 1e-2 --out runs/deit
    torchrun --nproc-per-node 8 -m recipes.imagenet --data imagenet --model efficientnet_b3 --bits 4 --ema 0.9999 --out runs/b3
    python -m recipes.imagenet --data imagenet --model deit_b_distilled --distil --start FLOAT --method diffq --bits 3 --out runs/distilled

The data are folders, train/CLASS/*.JPEG and val/CLASS/*.JPEG. The nets are those of timm, or transformers, or pytorchcv.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.main import main
from recipes.common.recipe import Batch, Recipe
from recipes.common.settings import Settings
from recipes.data.imagenet import load_pictures
from recipes.models.imagenet import make_model

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
_Read = list["Future[np.ndarray]"]


@dataclass(kw_only=True)
class ImageNetSettings(Settings):
    """AdamW along a cosine, from float weights (--start)."""

    model: Literal["deit_b", "deit_b_distilled", "efficientnet_b3"] = "deit_b"
    """The net."""
    size: int = 224
    """Pixels on a side."""
    smoothing: float = 0.1
    """Of the labels."""
    tiny: bool = False
    """A DeiT of two layers, 64 wide, for a trial."""
    min_size: int = 26215
    """Weights with fewer elements stay in float: 0.1 MiB, as in the public patch for DeiT."""
    epochs: float = 30
    """Length of the training."""
    batch_size: int = 256
    """Of all processes together."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    """Of the weights."""
    lr: float = 1e-4
    """Learning rate of the weights at the start."""
    weight_decay: float = 0.05
    """Of the weights."""
    warm_up: float = 0.02
    """Share of the training in which the rate rises."""
    clip_norm: float = 1.0
    """Largest norm of the gradients; 0 for none."""

    @classmethod
    def preset(cls, model: str, method: str) -> dict[str, Any]:
        """EfficientNet-B3 sees 300 pixels; the paper's bits for DeiT move at 5e-4, a tenth of it here."""
        size = {"size": 300} if model == "efficientnet_b3" else {}
        return {**size, "bits_lr": 5e-5} if method == "diffq-paper" else size


class ImageNet(Recipe[ImageNetSettings]):
    """Top-1 accuracy."""

    name, score_name = "imagenet", "top-1 accuracy in %"
    settings_type: ClassVar = ImageNetSettings

    def load(self) -> None:
        """The names of the pictures; threads decode them a batch ahead."""
        self.train, self.test = (load_pictures(self.settings.data / part, self.settings.limit) for part in ("train", "val"))
        if self.train.classes != self.test.classes:
            differing = sorted(set(self.train.classes) ^ set(self.test.classes))
            raise SystemExit(f"--data {self.settings.data}: train and val have different classes: {', '.join(differing[:5])}.")
        self.mean, self.std = (torch.tensor(each, device=self.device).view(3, 1, 1) * 255 for each in (_MEAN, _STD))
        self._ahead: dict[tuple[int, ...], _Read] = {}

    def make_model(self) -> nn.Module:
        """The net, in channels_last."""
        smaller = _SMALL if self.settings.tiny else {}
        model = make_model(self.settings.model, len(self.train.classes), size=self.settings.size, **smaller)
        return model.to(memory_format=torch.channels_last)

    @property
    def examples(self) -> int:
        """Pictures to train on."""
        return len(self.train.files)

    def batch(self, epoch: int, index: int, share: slice) -> Batch:
        """As any recipe's, while the next batch is being decoded."""
        result = super().batch(epoch, index, share)
        size = self.settings.batch_size
        following = self._order[1][(index + 1) * size : (index + 2) * size][share].tolist()
        if following and index + 1 < self.steps_an_epoch:
            self._ahead = {tuple(following): self._begin(following)}
        return result

    def _begin(self, numbers: list[int]) -> _Read:
        crops = np.random.default_rng((self.settings.seed, self._order[0], *numbers)).random((len(numbers), 4))
        return self.train.read(numbers, self.settings.size, crops)

    def take(self, pick: Tensor) -> Batch:
        """Random crops."""
        numbers = pick.tolist()
        read = self._ahead.pop(tuple(numbers), None) or self._begin(numbers)
        return (self._normalized(read),), torch.from_numpy(self.train.labels[numbers]).to(self.device)

    def _normalized(self, read: _Read) -> Tensor:
        pictures = torch.from_numpy(np.stack([each.result() for each in read])).to(self.device, non_blocking=True)
        return ((pictures.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy with smoothed labels; of both heads where there are two."""
        heads = output.float().unflatten(0, (len(target), 1)) if output.ndim == 2 else output.float()
        targets = target[:, None].expand(heads.shape[:2])
        return F.cross_entropy(heads.flatten(0, 1), targets.flatten(), label_smoothing=self.settings.smoothing)

    def test_batches(self) -> Iterator[Batch]:
        """All pictures, 100 at a time, decoded a batch ahead."""
        numbers = [list(range(i, min(i + 100, len(self.test.files)))) for i in range(0, len(self.test.files), 100)]
        ahead = self.test.read(numbers[0], self.settings.size, None)
        for here, following in zip(numbers, [*numbers[1:], []], strict=True):
            read, ahead = ahead, self.test.read(following, self.settings.size, None)
            yield (self._normalized(read),), torch.from_numpy(self.test.labels[here]).to(self.device)

    def reduce(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether the class is right; of two heads the mean decides, as in DeiT."""
        scores = output.softmax(-1).mean(1) if output.ndim == 3 else output
        return scores.argmax(-1) == target

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Accuracy."""
        return {"score": 100 * float(torch.cat(outputs).double().mean())}


if __name__ == "__main__":
    main(ImageNet)
