"""Write a result file: what was run, with which versions, on what, and the table."""

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def describe_machine() -> str:
    """Processor and cores, without a name or an address."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def write_result(name: str, title: str, body: str, packages: Sequence[str], *, command: str | None = None, folder: Path = RESULTS) -> Path:
    """Write ``<folder>/<name>_cpu<cores>_<date>.md`` and return its path; ``command`` is what was typed, this script's call if left out."""
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    command = command or " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    today = datetime.date.today().isoformat()
    text = f"# {title}\n\n{today} · {describe_machine()} · Python {platform.python_version()}, {versions}\n\n    {command}\n\n{body}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_cpu{os.cpu_count()}_{today}.md"
    path.write_text(text)
    return path
