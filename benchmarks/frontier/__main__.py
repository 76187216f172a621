"""Accuracy at an exact size, every system on the same real task from the same float model with the same number of steps.

    python -m benchmarks.frontier run cifar10 --data DIR --systems ours,lsq,diffq --bits 4,3,2 --seeds 0,1
    python -m benchmarks.frontier report
    python -m benchmarks.frontier wins ours ours-uniform
    python -m benchmarks.frontier picture cifar10 OUT.png --systems ours,lsq,float
    python -m benchmarks.frontier budgets cifar10 --data DIR

From the root of the repository. DIR holds the files that the task names if they are missing. Every point is one line of
``results/frontier_<task>.jsonl``; a run measures what is not there yet, so it may be stopped and goes on. Systems whose package is
missing are skipped with one line: run with another Python that has it, the points go into the same file.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks._result import RESULTS
from benchmarks.frontier.budgets import budgets
from benchmarks.frontier.points import SYSTEMS
from benchmarks.frontier.report import picture, report
from benchmarks.frontier.running import run
from benchmarks.frontier.tasks import TASKS
from benchmarks.frontier.wins import wins

_Item = TypeVar("_Item")


def _list_of(kind: Callable[[str], _Item]) -> Callable[[str], list[_Item]]:
    def parse(text: str) -> list[_Item]:
        return [kind(each.strip()) for each in text.split(",")]

    return parse


def main(arguments: list[str] | None = None) -> None:
    """Run points or write the report."""
    systems = "\n".join(f"  {name:18}{system.summary}{'' if system.is_default else ' (by name alone)'}" for name, system in SYSTEMS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier",
        description=f"{__doc__}\nsystems:\n{systems}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="measure the points that are missing")
    runs.add_argument("task", choices=TASKS)
    runs.add_argument("--data", type=Path, required=True, help="folder of the task's files")
    everything = [name for name, system in SYSTEMS.items() if system.is_default]
    runs.add_argument("--systems", type=_list_of(str), default=everything, help="separated by commas; all but the ablations if left out")
    runs.add_argument("--bits", type=_list_of(float), default=[4.0, 3.0, 2.0], help="budgets: the exact size of this many bits a weight")
    runs.add_argument("--seeds", type=_list_of(int), default=[0], help="such as 0,1")
    runs.add_argument("--steps", type=int, help="other than the task's own")
    runs.add_argument("--rate", type=float, help="learning rate other than the task's own")
    runs.add_argument("--penalty", type=float, help="loss per MiB other than the task's own, for diffq and ours-paper")
    runs.add_argument("--bits-rate", type=float, default=0.05, help="learning rate of bits that have an optimizer group of their own")
    runs.add_argument("--threads", type=int, help="torch's and onnxruntime's")
    runs.add_argument(
        "--onnx", action="store_true", help="export our systems' models and score the files, too; for points that are not there yet"
    )
    runs.add_argument(
        "--quick",
        action="store_true",
        help="next to no data and two steps, into a folder of its own (--results): to see that everything runs",
    )
    runs.set_defaults(call=run)
    reports = commands.add_parser("report", help="write table and plot of all points")
    reports.add_argument("task", nargs="?", choices=TASKS, help="all if left out")
    reports.set_defaults(call=report)
    win = commands.add_parser("wins", help="how often one system is ahead of another at the same budget and seed")
    win.add_argument("system", choices=SYSTEMS, metavar="system")
    win.add_argument("than", choices=SYSTEMS, metavar="than")
    win.set_defaults(call=wins)
    budget = commands.add_parser("budgets", help="train shortly at 2 to 8 bits: is the size the one that was asked for?")
    budget.add_argument("task", choices=TASKS)
    budget.add_argument("--data", type=Path, required=True, help="folder of the task's files")
    budget.add_argument("--threads", type=int, help="torch's")
    budget.add_argument("--quick", action="store_true", help="next to no data, into a folder of its own (--results)")
    budget.set_defaults(call=budgets)
    drawing = commands.add_parser("picture", help="draw the points of some systems")
    drawing.add_argument("task", choices=TASKS)
    drawing.add_argument("out", type=Path, help="PNG to write")
    drawing.add_argument("--systems", type=_list_of(str), required=True)
    drawing.add_argument(
        "--results", type=_list_of(Path), default=[RESULTS], help="folders; a system's points are of the last that has them"
    )
    drawing.add_argument("--title")
    drawing.set_defaults(call=picture)
    for each in (runs, reports, win, budget):
        each.add_argument("--results", type=Path, default=RESULTS, help="folder of the points and reports")
    asked = parser.parse_args(arguments)
    if getattr(asked, "quick", False) and asked.results == RESULTS:
        parser.error("--quick needs --results with another folder: its points are no results")
    asked.call(asked)


if __name__ == "__main__":
    main()
