"""Is the size that was asked for the one that comes out, whatever the budget, the length of the training and the scale of the loss?"""

import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks._result import markdown_table, write_result
from benchmarks.frontier.job import Point, budget_mib
from benchmarks.frontier.tasks import TASKS, Task
from diffq_fx import DiffQConfig, model_size, prepare

BITS = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
_SIZE_OF = {"bits": "widths", "entropy": "packed_file"}
"""By the names that stand in the results."""
SETTINGS = (("bits", 10, 1.0), ("bits", 40, 1.0), ("bits", 10, 1e-4), ("bits", 10, 1e4), ("entropy", 10, 1.0), ("entropy", 40, 1.0))
"""What the target holds, steps of the whole training, and what the loss is multiplied with."""
_WIDEST_CODED = 10
"""Coded levels of 8 bits take less than 8."""


def budgets(asked: argparse.Namespace) -> None:
    """Train at each budget and write how far the exact size is from it."""
    warnings.simplefilter("ignore")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    console = Console(stderr=True)
    task = TASKS[asked.task](asked.data, quick=asked.quick)
    kept = asked.results / f"budgets_{task.name}.jsonl"
    there = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    wanted = [(*setting, bits) for setting in SETTINGS for bits in BITS]
    missing = [each for each in wanted if each not in {(p["size"], p["steps"], p["scale"], p["bits"]) for p in there}]
    for size, steps, scale, bits in track(missing, task.name, console=console):
        point = _measure(task, size, steps, scale, bits)
        there.append(point)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a") as file:
            file.write(json.dumps(point) + "\n")
    print(_report(task, there, asked.results).read_text())


def _measure(task: Task, size: str, steps: int, scale: float, bits: float) -> Point:
    target = budget_mib(task, bits)
    torch.manual_seed(0)
    most = _WIDEST_CODED if size == "entropy" else 8
    config = DiffQConfig(target_mib=target, training_steps=steps, size_of=_SIZE_OF[size], max_bits=most)  # pyright: ignore[reportArgumentType]
    model = prepare(copy.deepcopy(task.float_model), task.example, config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate)
    batches, sizes = task.batches(0), []
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * task.loss(model, next(batches))).backward()
        optimizer.step()
        sizes.append(float(model_size(model).detach()))
    last = sizes[-max(steps // 5, 1) :]
    found = {"off": model_size(model, exact=True) / target - 1, "swing": max(last) / min(last) - 1, "mib": model_size(model, exact=True)}
    return {"size": size, "steps": steps, "scale": scale, "bits": bits, "target": target, **found}


def _report(task: Task, points: list[Point], results: Path) -> Path:
    header = ("size", "steps", "loss times", *(f"{bits:g} bits" for bits in BITS), "rising", "largest swing in the last fifth")
    table = markdown_table(header, _rows(points))
    worst = max(abs(point["off"]) for point in points)
    body = (
        f"Exact size over the target, less 1, in %: whole widths, of up to 8 bits or, where they are coded, {_WIDEST_CODED}, as convert "
        f"uses them. AdamW, rate {task.rate:g}. "
        f"The furthest off is {100 * worst:.2f} %.\n\n{table}"
    )
    return write_result(
        f"budgets_{task.name}",
        f"Budgets: {task.name}",
        body,
        ["torch"],
        command=f"python -m benchmarks.frontier budgets {task.name} --data DIR",
        folder=results,
    )


def _rows(points: list[Point]) -> Iterator[list[str]]:
    for size, steps, scale in SETTINGS:
        own = sorted((p for p in points if (p["size"], p["steps"], p["scale"]) == (size, steps, scale)), key=lambda point: point["bits"])
        if len(own) == len(BITS):
            rising = all(low["mib"] < high["mib"] for low, high in zip(own[:-1], own[1:], strict=True))
            swing = max(point["swing"] for point in own)
            yield [
                size,
                f"{steps}",
                f"{scale:g}",
                *(f"{100 * p['off']:+.2f}" for p in own),
                "yes" if rising else "no",
                f"{100 * swing:.2f} %",
            ]
