"""Small images that lie on the device as bytes, with one label each."""

from abc import abstractmethod
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from recipes.common.recipe import Batch, Recipe, S


class Images(Recipe[S]):
    """``train`` and ``test`` are images and labels."""

    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]

    @property
    def examples(self) -> int:
        """Images to train on."""
        return len(self.train[1])

    @abstractmethod
    def normalized(self, images: Tensor) -> Tensor:
        """What the net takes."""

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(output.float(), target)

    def test_batches(self) -> Iterator[Batch]:
        """All test images, 500 at a time."""
        for x, y in zip(*(each.split(500) for each in self.test), strict=True):
            yield (self.normalized(x),), y
