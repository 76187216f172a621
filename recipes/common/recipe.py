"""What a recipe is: real data, a model, a loss, and a score on the whole test set."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from recipes.common.settings import Settings

Inputs = tuple[Tensor, ...]
Batch = tuple[Inputs, Tensor]
Predict = Callable[..., Tensor]
"""A model, or an onnxruntime session in its place."""
S = TypeVar("S", bound=Settings)


class Lacking(SystemExit):
    """Data or a package that a recipe needs is not there; the message says how to get it."""


class Scored(ABC):
    """What training makes small, and how a model is scored on the whole test set."""

    score_name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """What training makes small."""

    @abstractmethod
    def test_batches(self) -> Iterator[Batch]:
        """The whole test set in batches of one size, but for the last."""

    @abstractmethod
    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """The ``score``, and what else is worth keeping, from all test batches."""

    def reduce(self, output: Tensor, target: Tensor) -> Tensor:
        """What of a test output is kept until :meth:`summarize`."""
        return output

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of a model on a batch."""
        return self.criterion(model(*batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, predict: Predict) -> dict[str, float]:
        """Scores of a model (which stays in the mode it is in) or of a session on the whole test set."""
        module = predict if isinstance(predict, nn.Module) else nn.Module()
        training = module.training
        module.eval()
        outputs, targets = [], []
        for inputs, target in self.test_batches():
            outputs.append(self.reduce(predict(*inputs).float(), target))
            targets.append(target)
        module.train(training)
        return self.summarize(outputs, targets)

    @property
    def example(self) -> Inputs:
        """Two test examples, on the CPU."""
        return tuple(each[:2].cpu() for each in next(self.test_batches())[0])


class Recipe(Scored, Generic[S]):
    """An experiment with one setting of its options; the loop asks it for all that is its own."""

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]]

    def __init__(self, settings: S, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self._order = -1, torch.empty(0)
        self.load()

    @abstractmethod
    def load(self) -> None:
        """Read the data, of ``settings.limit`` examples where that is not 0, onto the device."""

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The float model with fresh weights, on the CPU."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """How many there are to train on."""

    @abstractmethod
    def take(self, pick: Tensor) -> Batch:
        """A training batch of the examples with these numbers, augmented."""

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps in one epoch: the last, smaller batch is left out."""
        return max(self.examples // self.settings.batch_size, 1)

    def batch(self, epoch: int, index: int, share: slice) -> Batch:
        """Batch number ``index`` of an epoch, of which this process gets its share (``rank::processes``)."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch)
            self._order = epoch, torch.randperm(self.examples, generator=generator).to(self.device)
        size = self.settings.batch_size
        return self.take(self._order[1][index * size : (index + 1) * size][share])

    def groups_for_ipq(self, names: list[str]) -> list[list[str]]:
        """The weights that iPQ rounds together, in turn; the paper has feed-forward layers, embeddings, attention."""
        return [["*"]]
