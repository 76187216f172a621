"""The points that were measured: one line of JSON each, only ever appended to, so that a run can stop and go on."""

import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

from benchmarks.frontier.job import Point, System
from benchmarks.frontier.ours import OURS
from benchmarks.frontier.peers import PEERS
from benchmarks.frontier.post_training import POST_TRAINING

SYSTEMS: dict[str, System] = {**OURS, **PEERS, **POST_TRAINING}
KEY = ("system", "bits", "seed", "steps", "rate", "penalty", "bits_rate")
"""What tells points apart. The penalty is null where the task's own was used; a system that does not train has no seed,
steps and rates."""


def path_of(results: Path, task: str) -> Path:
    """Where the points of a task are."""
    return results / f"frontier_{task}.jsonl"


def read_points(results: Path, task: str) -> list[Point]:
    """All points of a task that were measured so far."""
    path = path_of(results, task)
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number} is no JSON ({error}): a run was cut off while it wrote; delete the line.") from error
    return found


def append_point(results: Path, task: str, point: Point) -> None:
    """Add one."""
    results.mkdir(parents=True, exist_ok=True)
    with path_of(results, task).open("a", encoding="utf-8") as file:
        file.write(json.dumps(point, ensure_ascii=False) + "\n")


def key_of(point: Point) -> tuple[Any, ...]:
    """What tells a point from others."""
    return tuple(point[name] for name in KEY)


def versions(system: System) -> dict[str, str]:
    """Versions of all that a system's point depends on."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys(("torch", *system.packages)):
        if package == "diffq-fx":
            from diffq_fx import __version__

            found[package] = __version__
        else:
            found[package] = importlib.metadata.version(package)
    return found


def missing_package(system: System) -> str | None:
    """The first package of a system that is not installed."""
    names = (package for package in system.packages if package != "diffq-fx")
    return next((name for name in names if importlib.util.find_spec(name) is None), None)
