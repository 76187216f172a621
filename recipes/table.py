"""A markdown table of results: ``python -m recipes.table runs/*/result.json``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HEADER = (
    "recipe",
    "model",
    "method",
    "setting",
    "epochs",
    "MiB",
    "float MiB",
    "packed file, MiB",
    "score",
    "score of the ONNX file",
    "ms a step",
    "device",
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """One row for each result."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    return "\n".join([*lines, *("| " + " | ".join(_cells(result)) + " |" for result in results)])


def _cells(result: dict[str, Any]) -> list[str]:
    def of_file(name: str, what: str, digits: int) -> str:
        found = result.get(name)
        return f"{found[what]:.{digits}f}" if isinstance(found, dict) else ""  # result.json says why there is none

    setting = ", ".join(f"{name}={value}" for name, value in result["settings"].items() if name != "epochs")
    sizes = [f"{result['size_mib']:.3f}", f"{result['float_mib']:.2f}", of_file("packed", "mib", 3)]
    scores = [f"{result['score']:.2f} ({result['score_name']})", of_file("onnx", "score", 2)]
    device = result["device"] if result["processes"] == 1 else f"{result['processes']} x {result['device']}"
    first = [str(result[name]) for name in ("recipe", "model", "method")]
    return [*first, setting, f"{result['settings']['epochs']:g}", *sizes, *scores, f"{result['step_ms']:.1f}", device]


if __name__ == "__main__":
    print(table([json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]))  # noqa: T201
