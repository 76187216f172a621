"""The one training loop of all systems: AdamW, a learning rate that falls along a cosine."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffq_fx import Distillation

if TYPE_CHECKING:
    from benchmarks.frontier.tasks.base import Batch, Task

Tell = Callable[[int, float], None]
"""Told after each step: its number and its loss."""


def silent(step: int, loss: float) -> None:
    """Tell nobody."""


class Training:
    """So many steps of one model on one task; :meth:`advance` may make them in parts.

    ``set_up`` gets the optimizer before the first step (diffq and learned widths put parameters in groups of their own), ``extra`` is added
    to the loss, ``distillation`` makes the distance to its teacher the loss in place of the task's own, ``warm_up`` is the number of steps
    in which the learning rate rises (the float models' training alone has them).
    """

    def __init__(
        self,
        task: "Task",
        model: nn.Module,
        *,
        seed: int,
        steps: int,
        rate: float,
        set_up: Callable[[torch.optim.Optimizer], None] | None = None,
        extra: Callable[[], Tensor] | None = None,
        distillation: Distillation | None = None,
        warm_up: int = 0,
        tell: Tell = silent,
    ) -> None:
        torch.manual_seed(seed)
        self.task, self.model, self.extra, self.distillation, self.tell = task, model, extra, distillation, tell
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
        if set_up is not None:
            set_up(self.optimizer)

        def share_of_rate(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1))) / 2

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share_of_rate)
        self.batches = task.batches(seed)
        self.done = 0

    def advance(self, steps: int) -> None:
        """Make this many steps."""
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self._loss(next(self.batches))
            (loss if self.extra is None else loss + self.extra()).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.done += 1
            self.tell(self.done, loss.item())

    def _loss(self, batch: "Batch") -> Tensor:
        if self.distillation is None:
            return self.task.loss(self.model, batch)
        return self.distillation(batch[0], self.model(*batch[0]))
