"""What a task is: real data, a float model, and settings of the training."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from benchmarks._result import RESULTS
from benchmarks.frontier.training import Tell, Training, silent
from recipes.common.recipe import Batch, Inputs, Lacking, Scored


class Task(Scored):
    """Real data and a float model; ``quick`` takes so little of both that a test can run it, and keeps nothing."""

    name: ClassVar[str]
    has_convolutions: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]]
    steps: ClassVar[int]
    """Training steps of every system."""
    rate: ClassVar[float]
    """Learning rate of every system."""
    penalties: ClassVar[dict[int, float]]
    """Loss per MiB for systems without a target, by the budget in bits: a first guess; the table shows what size it led to."""
    float_steps: ClassVar[int] = 0
    float_rate: ClassVar[float] = 1e-3

    float_model: nn.Module

    def __init__(self, folder: Path, *, quick: bool = False, tell: Tell = silent) -> None:
        self.quick = quick
        missing = [name for name in self.files if not (folder / name).exists()]
        if missing:
            raise Lacking(f"{folder} lacks {', '.join(missing)}, which the task {self.name} reads: put them there.")
        self.load(folder)
        self.float_model = self.make_float_model(folder, tell).eval()

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read the data."""

    @abstractmethod
    def make_float_model(self, folder: Path, tell: Tell) -> nn.Module:
        """Read the float model, or train it."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end."""

    @property
    def test_example(self) -> Inputs:
        """A test batch to export with."""
        return next(self.test_batches())[0]

    def calibration(self) -> Iterator[Inputs]:
        """Training inputs in batches of a test batch's size, without end."""
        size = len(next(self.test_batches())[1])
        batches = self.batches(0)
        while True:
            parts: list[Inputs] = []
            while sum(len(part[0]) for part in parts) < size:
                parts.append(next(batches)[0])
            yield tuple(torch.cat(each)[:size] for each in zip(*parts, strict=True))

    def unlabelled(self) -> list[Inputs]:
        """Inputs that a compression without training may look at: those of 32 training batches."""
        return [inputs for (inputs, _), _ in zip(self.batches(0), range(32), strict=False)]

    def train_once(self, model: nn.Module, tell: Tell) -> nn.Module:
        """Train the float model, or take the one that was kept beside the results (git ignores it)."""
        kept = RESULTS / f".frontier_{self.name}_float.pt"
        steps = 2 if self.quick else self.float_steps
        if kept.exists() and not self.quick:
            state = torch.load(kept)
            if state["steps"] != steps:
                raise SystemExit(f"{kept} was trained for {state['steps']} steps, the task now asks for {steps}: delete it.")
            model.load_state_dict(state["weights"])
            return model
        Training(self, model, seed=0, steps=steps, rate=self.float_rate, warm_up=steps // 20, tell=tell).advance(steps)
        if not self.quick:
            kept.parent.mkdir(exist_ok=True)
            torch.save({"weights": model.state_dict(), "steps": steps}, kept)
        return model
