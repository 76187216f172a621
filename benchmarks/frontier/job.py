"""What a system is, and what it is asked for: one point of the frontier."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.frontier.tasks import Task
from benchmarks.frontier.training import Tell, Training
from diffq_fx import Distillation, model_size, prepare
from diffq_fx.methods import STE

Point = dict[str, Any]


class NotApplicableError(Exception):
    """The system cannot do this task or this point; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One point to measure."""

    task: Task
    bits: float
    seed: int
    steps: int
    rate: float
    penalty: float | None
    """Loss per MiB for systems without a target; None for the task's own."""
    bits_rate: float
    """Learning rate of the bits where a system trains them in a group of their own."""
    through_onnx: bool
    tell: Tell

    @property
    def budget_mib(self) -> float:
        """The exact size that all systems aim at."""
        return budget_mib(self.task, self.bits)

    @property
    def chosen_penalty(self) -> float:
        """Loss per MiB."""
        return self.penalty if self.penalty is not None else self.task.penalties[min(self.task.penalties, key=lambda b: abs(b - self.bits))]

    @property
    def whole_bits(self) -> int:
        """The nearest width, for systems that have one for all weights."""
        return round(self.bits)

    def copy_of_float(self) -> nn.Module:
        """A model to train."""
        return copy.deepcopy(self.task.float_model)

    def training(
        self,
        model: nn.Module,
        *,
        set_up: Callable[[torch.optim.Optimizer], None] | None = None,
        extra: Callable[[], Tensor] | None = None,
        distillation: Distillation | None = None,
    ) -> Training:
        """The training that everybody gets, not yet begun."""
        return Training(
            self.task,
            model,
            seed=self.seed,
            steps=self.steps,
            rate=self.rate,
            set_up=set_up,
            extra=extra,
            distillation=distillation,
            tell=self.tell,
        )


@dataclass(frozen=True, kw_only=True)
class System:
    """A way to make a model smaller."""

    run: Callable[[Job], Point]
    """Gives ``mib``, ``setting``, ``score`` and what else the task scores."""
    summary: str
    packages: tuple[str, ...] = ("diffq-fx",)
    """What it comes from; the first is asked for before it runs."""
    bits: float | None = None
    """The only width it has; None where it takes what is asked."""
    trains: bool = True
    is_default: bool = True
    """Whether it runs where no systems are named."""


def float_mib(model: nn.Module) -> float:
    """Size of the float parameters."""
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20


def budget_mib(task: Task, bits: float) -> float:
    """Exact size of the task's model with ``bits`` bits a weight and one scale per output channel: what our STE takes.

    Between whole widths it is interpolated.
    """
    low = int(bits)
    share = bits - low
    return (1 - share) * _ste_mib(task, low) + (share * _ste_mib(task, low + 1) if share else 0.0)


@functools.cache
def _ste_mib(task: Task, bits: int) -> float:
    return float(model_size(prepare(copy.deepcopy(task.float_model), task.example, STE(bits=bits)), exact=True))
