"""How often one system scores better than another at the same budget and seed."""

import argparse
import statistics

from benchmarks._result import markdown_table
from benchmarks.frontier.points import path_of, read_points
from benchmarks.frontier.tasks import TASKS, Task


def wins(asked: argparse.Namespace) -> None:
    """Print a row for each task and budget that both systems have points of, and the win rate over all."""
    kinds = [kind for name, kind in TASKS.items() if path_of(asked.results, name).exists()]
    rows = [row for kind in kinds for row in _rows(asked, kind)]
    won, played = (sum(row[i] for row in rows) for i in (0, 1))
    header = ("task", "bits", f"{asked.system}, mean", f"{asked.than}, mean", "ahead by, mean", "by seed", "wins")
    print(markdown_table(header, [row[2:] for row in rows]))
    print(f"\n{asked.system} is ahead of {asked.than} in {won} of {played} points.")


def _rows(asked: argparse.Namespace, kind: type[Task]) -> list[tuple]:
    """Points won, points in all, and the cells of a row; seeds, steps and rates that one of the two lacks do not count."""
    scores: dict[float, dict[tuple, dict[str, float]]] = {}
    for point in read_points(asked.results, kind.name):
        if point["system"] in (asked.system, asked.than):
            pairs = scores.setdefault(point["bits"], {}).setdefault((point["seed"], point["steps"], point["rate"]), {})
            pairs[point["system"]] = point["score"]
    sign, rows = (1 if kind.higher_is_better else -1), []
    for bits, by_seed in sorted(scores.items()):
        pairs = [(each[asked.system], each[asked.than]) for _, each in sorted(by_seed.items()) if len(each) == 2]
        if pairs:
            ahead = [sign * (one - other) for one, other in pairs]
            won = sum(each > 0 for each in ahead)
            means = (f"{statistics.mean(each):.3f}" for each in (*zip(*pairs, strict=True), ahead))
            rows.append(
                (won, len(pairs), kind.name, f"{bits:g}", *means, ", ".join(f"{each:+.3f}" for each in ahead), f"{won}/{len(pairs)}")
            )
    return rows
