"""Measure the points that are missing."""

import argparse
import time
import warnings
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.frontier.job import Job, NotApplicableError, Point, System
from benchmarks.frontier.points import KEY, SYSTEMS, append_point, key_of, missing_package, read_points, versions
from benchmarks.frontier.tasks import TASKS, Task


def run(asked: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet; a system that cannot run says why in one line."""
    warnings.simplefilter("ignore")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    console = Console(stderr=True)
    unknown = [name for name in asked.systems if name not in SYSTEMS]
    if unknown:
        raise SystemExit(f"There is no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}.")
    kind = TASKS[asked.task]
    keys = [key for key in dict.fromkeys(_keys(asked, kind)) if not _is_there(asked, key)]
    for name in dict.fromkeys(key[0] for key in keys):
        package = missing_package(SYSTEMS[name])
        if package is not None:
            console.print(f"{name}: skipped, {package} is not installed here", highlight=False, soft_wrap=True)
            keys = [key for key in keys if key[0] != name]
    if not keys:
        console.print("every point that can be measured here is there")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        line = progress.add_task("float model", total=None)
        task = kind(asked.data, quick=asked.quick, tell=lambda step, loss: progress.update(line, completed=step))
        progress.remove_task(line)
        _measure(asked, task, keys, progress)


def _keys(asked: argparse.Namespace, kind: type[Task]) -> Iterator[tuple]:
    """Every point that is asked for, as its key."""
    steps = asked.steps or (2 if asked.quick else kind.steps)
    rate = asked.rate or kind.rate
    for seed in asked.seeds:
        for bits in asked.bits:
            for name in asked.systems:
                system = SYSTEMS[name]
                width = bits if system.bits is None else float(system.bits)
                trained = (name, width, seed, steps, rate, asked.penalty, asked.bits_rate)
                yield trained if system.trains else (name, width, 0, 0, 0.0, None, 0.0)


def _is_there(asked: argparse.Namespace, key: tuple) -> bool:
    return key in {key_of(point) for point in read_points(asked.results, asked.task)}


def _measure(asked: argparse.Namespace, task: Task, keys: list[tuple], progress: Progress) -> None:
    overall = progress.add_task(task.name, total=len(keys))
    refused: set[str] = set()
    for key in keys:
        name = key[0]
        if name not in refused and not _is_there(asked, key):  # another process may have measured it meanwhile
            line = progress.add_task(f"{name}, {key[1]:g} bits, seed {key[2]}", total=key[3] or None)
            job = _job(asked, task, key, lambda step, loss, line=line: progress.update(line, completed=step))
            try:
                point = _point(key, job, SYSTEMS[name])
            except NotApplicableError as reason:
                refused.add(name)
                progress.console.print(f"{name}: not applicable to {task.name}: {reason}", highlight=False, soft_wrap=True)
            else:
                append_point(asked.results, task.name, point)
                progress.console.print(
                    f"{name}, {key[1]:g} bits, seed {key[2]}: {point['mib']:.4f} MiB, {point['score']:.3f}, {point['seconds']} s",
                    highlight=False,
                    soft_wrap=True,
                )
            progress.remove_task(line)
        progress.advance(overall)


def _job(asked: argparse.Namespace, task: Task, key: tuple, tell) -> Job:
    _, bits, seed, steps, rate, penalty, bits_rate = key
    return Job(
        task=task,
        bits=bits,
        seed=seed,
        steps=steps,
        rate=rate,
        penalty=penalty,
        bits_rate=bits_rate,
        through_onnx=asked.onnx,
        tell=tell,
    )


def _point(key: tuple, job: Job, system: System) -> Point:
    budget = job.budget_mib if system.bits is None and system.trains else None
    began, cpu_began = time.monotonic(), time.process_time()
    found = system.run(job)
    return {
        **dict(zip(KEY, key, strict=True)),
        "budget_mib": budget,
        **found,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu_began, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(system),
        "quick": job.task.quick,
    }
