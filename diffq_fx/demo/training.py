"""The loop of the demo: an ordinary one, the same for the float and the prepared model."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from diffq_fx.demo.tasks import Task


def train(model: nn.Module, task: Task, epochs: int, learning_rate: float, on_step: Callable[[], None]) -> None:
    """Train a model; nothing in here knows whether it is prepared."""
    steps = epochs * task.steps_per_epoch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for inputs, targets in task.batches(generator):
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            on_step()


@torch.no_grad()
def accuracy(predict: Callable[[torch.Tensor], torch.Tensor], task: Task) -> float:
    """Share of the test set that is predicted right, in percent."""
    inputs, targets = task.test
    hits = sum(int((predict(part).argmax(-1) == target).sum()) for part, target in zip(inputs.split(128), targets.split(128), strict=True))
    return 100 * hits / targets.numel()
