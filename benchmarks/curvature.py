"""Which measure of curvature puts the bits where the least loss is: allocations from 20 batches, compared on others.

    python -m benchmarks.curvature cifar10 --data DIR --bits 2

From the root of the repository; the tasks and their files are those of ``benchmarks.frontier``. No weight moves. On every batch the noise
is that of the budget, b bits in all groups, and that of one bit more. The loss that an allocation costs is predicted from the gradient of
the bits on batches that no allocation has seen, ``sum_g m_g (4^-(b_g - b) - 1) / (2 ln 2)`` with ``m = -dL/db``: it has no bias, whatever
the curvature is thought to be. Below 0 is better than the same bits for all. Beside it stands the loss of the truly rounded weights, on
other batches.
"""

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._least_loss import curvatures, least_loss_widths
from benchmarks._result import markdown_table, write_result
from benchmarks.frontier.job import budget_mib
from benchmarks.frontier.tasks import TASKS, Task
from diffq_fx import DiffQConfig, prepare
from diffq_fx.budget import sensitivity
from diffq_fx.budget.allocation import allocate_widths
from diffq_fx.methods.diffq import DiffQWeight
from diffq_fx.methods.predicted_loss import errors_at

_SEEN = 20
"""Batches that allocations are made from, as many as training has steps for it."""
_OTHERS = 8
"""Batches for the loss of rounded weights."""
_LEAST = 0.1
"""A difference of mean squares counts at least this part of the larger one."""


class Gathered:
    """What the batches tell of every group, at the budget's noise and at half of it."""

    def __init__(self, task: Task, bits: float, batches: int) -> None:
        torch.manual_seed(0)
        self.budget_mib = budget_mib(task, bits)
        model = prepare(copy.deepcopy(task.float_model), task.example, DiffQConfig(target_mib=self.budget_mib)).train()
        self.task, self.model, self.compression = task, model, model.compression
        self.others = [batch for batch, _ in zip(task.batches(1), range(_OTHERS), strict=False)]
        self.learned: Sequence[DiffQWeight] = self.compression.learned
        self.start_T = self.compression.bit_state().bits_T().clone()
        self.spans = [quantizer.span_in_training(quantizer.weight.detach()) for quantizer in self.learned]
        self.full, self.half, self.full_of_even, self.half_of_odd = (
            [torch.zeros_like(quantizer.get_buffer("gradient_sums")) for quantizer in self.learned] for _ in range(4)
        )
        self.unseen_T = torch.zeros_like(self.start_T)
        for number, batch in zip(range(batches), task.batches(0), strict=False):
            for finer in (0, 1):
                self._backward(task, model, batch, finer)
                self._keep(number, finer)
        self.unseen_T /= batches - _SEEN

    def _backward(self, task: Task, model: nn.Module, batch: tuple, finer: int) -> None:
        with self.compression.changing_bits() as state:
            state.set_bits(self.start_T + finer)
        model.zero_grad()
        task.loss(model, batch).backward()

    def _keep(self, number: int, finer: int) -> None:
        if number >= _SEEN:
            if not finer:
                slopes = (-q.logits.grad / torch.autograd.grad(q.bits().sum(), q.logits)[0] for q in self.learned)
                self.unseen_T += torch.cat([each.reshape(-1) for each in slopes])
            return
        every, some = (self.half, self.half_of_odd) if finer else (self.full, self.full_of_even)
        for kind in (every, some) if number % 2 == finer else (every,):
            for quantizer, sums in zip(self.learned, kind, strict=True):
                sensitivity.observe(quantizer.spec, quantizer.weight.grad, sums)
                sums[2] += quantizer.logits.grad

    def widths_of(self, asked: Sequence[Tensor]) -> Tensor:
        """The whole widths of groups that ask for so many bits, but for a constant."""
        groups, budget = self.compression.groups(), self.compression.budget_bits()
        bits_T = sensitivity.bits_within(groups, torch.cat([each.reshape(-1) for each in asked]), budget)
        return allocate_widths(groups, bits_T, budget)

    def predicted(self, width_T: Tensor) -> float:
        """What the gradient of the bits says that widths cost, beside the same width for all."""
        return float(torch.dot(self.unseen_T, 4 ** (self.start_T - width_T) - 1)) / (2 * math.log(2))

    @torch.no_grad()
    def rounded(self, width_T: Tensor) -> float:
        """The loss of the truly rounded weights, on batches of the training data that no allocation has seen."""
        model = copy.deepcopy(self.model).train()
        compression = model.compression
        for quantizer, width in zip(compression.learned, compression.groups().split(width_T.float()), strict=True):
            quantizer.width.copy_(width.view_as(quantizer.width))
            quantizer.keep_range()
        compression.note(frozen=True)
        return sum(float(self.task.loss(model, batch)) for batch in self.others) / len(self.others)


def _asked(gathered: Gathered, sums: Sequence[Tensor], power: float) -> list[Tensor]:
    pairs = zip(gathered.learned, sums, gathered.spans, strict=True)
    return [2 * power * sensitivity.asked_bits(quantizer.spec, own, span) for quantizer, own, span in pairs]


def _difference(full: Sequence[Tensor], half: Sequence[Tensor]) -> list[Tensor]:
    """Sums whose mean squares are what the larger noise adds, at least a part of what is there."""
    found = [own.clone() for own in full]
    for own, small in zip(found, half, strict=True):
        own[0] = torch.maximum(own[0] - small[0], _LEAST * own[0])
    return found


def _curvature(gathered: Gathered) -> Tensor:
    """The curvature whose level was measured for each weight, shape (T,)."""
    with gathered.compression.changing_bits() as state:
        state.set_bits(gathered.start_T)
    sums = [own.clone() for own in gathered.full]
    for quantizer, own in zip(gathered.learned, sums, strict=True):
        sensitivity.measure_curvature(own, *quantizer.squared_noise())
    return curvatures([quantizer.spec for quantizer in gathered.learned], sums)


def _least(gathered: Gathered, power: float) -> Tensor:
    """The widths with the least sum of a power of the curvature times the squared rounding errors."""
    groups, curvature_T = gathered.compression.groups(), _curvature(gathered)
    every = gathered.compression.config.limits.widths
    errors = {width: errors_at(gathered.learned, groups, torch.full_like(curvature_T, width)) for width in every}
    losses = {width: curvature_T**power * own for width, own in errors.items()}
    return least_loss_widths(groups, losses, gathered.compression.budget_bits())


def _rule(ask: Callable[[Gathered], list[Tensor]]) -> Callable[[Gathered], Tensor]:
    return lambda gathered: gathered.widths_of(ask(gathered))


RULES: dict[str, Callable[[Gathered], Tensor]] = {
    "the same bits for all": _rule(lambda g: [torch.zeros_like(each[0]) for each in g.full]),
    "log2(R sqrt(F)) / 2, in training": _rule(lambda g: _asked(g, g.full, 0.5)),
    "3 log2(R sqrt(F)) / 4": _rule(lambda g: _asked(g, g.full, 0.75)),
    "log2(R sqrt(F))": _rule(lambda g: _asked(g, g.full, 1.0)),
    "log2(R sqrt(F - F')) / 2, F' at half the noise, 10 batches each": _rule(
        lambda g: _asked(g, _difference(g.full_of_even, g.half_of_odd), 0.5)
    ),
    "the same, 20 batches each": _rule(lambda g: _asked(g, _difference(g.full, g.half), 0.5)),
    "least sum of sqrt(H) times squared errors": lambda g: _least(g, 0.5),
    "least sum of H times squared errors": lambda g: _least(g, 1.0),
}


def main() -> None:
    """Gather, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True, help="folder of the task's files")
    parser.add_argument("--bits", type=float, default=2.0, help="budget: the exact size of this many bits a weight")
    parser.add_argument("--batches", type=int, default=60, help=f"{_SEEN} of them for the allocations, the others to compare these on")
    parser.add_argument("--threads", type=int, help="torch's")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    gathered = Gathered(TASKS[asked.task](asked.data), asked.bits, asked.batches)
    now = float(gathered.unseen_T.sum()) / (2 * math.log(2))
    rows = []
    for name, rule in RULES.items():
        width_T = rule(gathered)
        predicted = gathered.predicted(width_T)
        share = [f"{100 * float((width_T == width).float().mean()):.0f}" for width in range(1, 6)]
        rows.append([name, f"{predicted:+.4f}", f"{100 * predicted / now:+.0f} %", f"{gathered.rounded(width_T):.4f}", *share])
    table = markdown_table(
        ("bits", "predicted", "of the noise's", "loss when rounded", *(f"{width} bits, % of groups" for width in range(1, 6))), rows
    )
    body = (
        f"{asked.task}, {asked.bits:g} bits a weight ({gathered.budget_mib:.4g} MiB). The noise of the same bits adds {now:.4f}.\n\n{table}"
    )
    command = f"python -m benchmarks.curvature {asked.task} --data DIR --bits {asked.bits:g} --batches {asked.batches}"
    print(write_result(f"curvature_{asked.task}", f"Curvature: {asked.task}", body, ["torch"], command=command).read_text())


if __name__ == "__main__":
    main()
