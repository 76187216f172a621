"""Which measure of curvature puts the bits where the least loss is: allocations from 20 batches, compared on others.

    python -m benchmarks.curvature cifar10 --data DIR --bits 2

From the root of the repository; the tasks and their files are those of ``benchmarks.frontier``. No weight moves. On every batch the noise
is that of the budget, b bits in all groups, and that of one bit more. The loss that an allocation costs is predicted from the gradient of
the bits on batches that no allocation has seen, ``sum_g m_g (4^-(b_g - b) - 1) / (2 ln 2)`` with ``m = -dL/db``: it has no bias, whatever
the curvature is thought to be. Below 0 is better than the same bits for all.
"""

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._result import markdown_table, write_result
from benchmarks.frontier.job import budget_mib
from benchmarks.frontier.tasks import TASKS, Task
from diffq_fx import DiffQConfig, prepare
from diffq_fx.budget import sensitivity
from diffq_fx.budget.allocation import allocate_widths
from diffq_fx.methods.diffq import DiffQWeight

_SEEN = 20
"""Batches that allocations are made from, as many as training has steps for it."""
_LEAST = 0.1
"""A difference of mean squares counts at least this part of the larger one."""


class Gathered:
    """What the batches tell of every group, at the budget's noise and at half of it."""

    def __init__(self, task: Task, bits: float, batches: int) -> None:
        torch.manual_seed(0)
        self.budget_mib = budget_mib(task, bits)
        model = prepare(copy.deepcopy(task.float_model), task.example, DiffQConfig(target_mib=self.budget_mib)).train()
        self.compression = model.compression
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

    def loss_of(self, asked: Sequence[Tensor]) -> tuple[float, Tensor]:
        """The predicted loss of the whole widths that groups get which ask for so many bits, and the widths."""
        groups, budget = self.compression.groups(), self.compression.budget_bits()
        bits_T = sensitivity.bits_within(groups, torch.cat([each.reshape(-1) for each in asked]), budget)
        width_T = allocate_widths(groups, bits_T, budget)
        return float(torch.dot(self.unseen_T, 4 ** (self.start_T - width_T) - 1)) / (2 * math.log(2)), width_T


def _asked(gathered: Gathered, sums: Sequence[Tensor], power: float) -> list[Tensor]:
    pairs = zip(gathered.learned, sums, gathered.spans, strict=True)
    return [2 * power * sensitivity.asked_bits(quantizer.spec, own, span) for quantizer, own, span in pairs]


def _difference(full: Sequence[Tensor], half: Sequence[Tensor]) -> list[Tensor]:
    """Sums whose mean squares are what the larger noise adds, at least a part of what is there."""
    found = [own.clone() for own in full]
    for own, small in zip(found, half, strict=True):
        own[0] = torch.maximum(own[0] - small[0], _LEAST * own[0])
    return found


def _measured(gathered: Gathered) -> list[Tensor]:
    """``log2(R sqrt(H))`` with the curvature whose level was measured for each weight."""
    with gathered.compression.changing_bits() as state:
        state.set_bits(gathered.start_T)
    sums = [own.clone() for own in gathered.full]
    for quantizer, own in zip(gathered.learned, sums, strict=True):
        logits = quantizer.logits.detach().requires_grad_()
        noise = quantizer.squared_noise(logits)
        sensitivity.measure_curvature(own, noise.detach(), torch.autograd.grad(noise.sum(), logits)[0])
    curvature_T = sensitivity.curvatures([quantizer.spec for quantizer in gathered.learned], sums)
    noise_T = torch.cat([own[3].reshape(-1) for own in sums])
    counts_T = torch.cat([quantizer.spec.bits_layout.counts().reshape(-1) for quantizer in gathered.learned])
    return [torch.log2(curvature_T * noise_T / counts_T) / 2]


RULES: dict[str, Callable[[Gathered], list[Tensor]]] = {
    "the same bits for all": lambda g: [torch.zeros_like(each[0]) for each in g.full],
    "log2(R sqrt(F)) / 2, in training": lambda g: _asked(g, g.full, 0.5),
    "3 log2(R sqrt(F)) / 4": lambda g: _asked(g, g.full, 0.75),
    "log2(R sqrt(F)): H in proportion to F": lambda g: _asked(g, g.full, 1.0),
    "log2(R sqrt(F - F')) / 2, F' at half the noise, 10 batches each": lambda g: _asked(g, _difference(g.full_of_even, g.half_of_odd), 0.5),
    "the same, 20 batches each": lambda g: _asked(g, _difference(g.full, g.half), 0.5),
    "log2(R sqrt(H)): F, its level measured for each weight, without training": _measured,
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
        loss, width_T = gathered.loss_of(rule(gathered))
        share = [f"{100 * float((width_T == width).float().mean()):.0f}" for width in range(1, 6)]
        rows.append([name, f"{loss:+.4f}", f"{100 * loss / now:+.0f} %", *share])
    table = markdown_table(("bits", "loss", "of the noise's", *(f"{width} bits, % of groups" for width in range(1, 6))), rows)
    body = (
        f"{asked.task}, {asked.bits:g} bits a weight ({gathered.budget_mib:.4g} MiB). The noise of the same bits adds {now:.4f}.\n\n{table}"
    )
    command = f"python -m benchmarks.curvature {asked.task} --data DIR --bits {asked.bits:g} --batches {asked.batches}"
    print(write_result(f"curvature_{asked.task}", f"Curvature: {asked.task}", body, ["torch"], command=command).read_text())


if __name__ == "__main__":
    main()
