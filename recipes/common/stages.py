"""iPQ after the training: one group of layers after another is rounded to its codebooks, and what is left is finetuned after each."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffq_fx.methods.product_quantization import ProductWeight
from diffq_fx.training.ipq import IPQ, IPQStage

if TYPE_CHECKING:
    from recipes.common.loop import Training


class Stages:
    """The driver over the recipe's groups, with its loss and its data."""

    def __init__(self, training: "Training") -> None:
        self.training = training
        names = [quantizer.spec.name for quantizer in training.model.compression.quantizers if isinstance(quantizer, ProductWeight)]
        groups = training.recipe.groups_for_ipq(names)
        self.driver = IPQ(training.model, groups, self._finetune, progress=self._keep)

    def run(self) -> None:
        """Round what is not rounded yet."""
        self.driver.run()

    def history(self) -> list[dict[str, Any]]:
        """The stages so far; the rest of the driver's state is the model's."""
        return [asdict(stage) for stage in self.driver.history]

    def load(self, history: Sequence[dict[str, Any]]) -> None:
        """Go on from the model's state and this history."""
        self.driver.load_state_dict({"model": self.training.model.state_dict(), "history": list(history)})

    def _keep(self, stage: IPQStage) -> None:
        self.training.tell({"stage": float(stage.index), "error": stage.error, "seconds": stage.seconds})
        self.training.save()

    def _finetune(self, model: nn.Module, stage: IPQStage) -> None:
        training, settings, recipe = self.training, self.training.settings, self.training.recipe
        training.running = training.wrapped()  # DistributedDataParallel wants to know which parameters train from now on
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=settings.finetune_lr, momentum=0.9)
        each_epoch = recipe.steps_an_epoch
        first = training.steps + stage.index * math.ceil(settings.finetune_epochs * each_epoch)
        for number in range(first, first + math.ceil(settings.finetune_epochs * each_epoch)):
            torch.manual_seed((settings.seed + 1) * 1_000_003 + number)
            epoch, index = divmod(number, each_epoch)
            optimizer.zero_grad()
            training.loss(recipe.batch(epoch, index, training.processes.share)).backward()
            optimizer.step()
