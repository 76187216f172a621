"""Install the package beside old and new versions of what it needs, run a core of the tests there, and write a table.

``python -m benchmarks.version_matrix`` runs every row, ``... oldest newest`` only these; rows that are not run keep their last result.
Each row is an environment of its own under ``.matrix/``, removed when it is done (``--keep`` keeps it and uses it again). A row needs
``python3.X`` on the PATH, or is given one: ``--python /path/to/python3.14``. Nothing but the standard library is used here, so any Python
can run it.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = ("torch", "onnx", "onnxruntime", "onnxscript", "onnx-ir", "numpy")
TESTS = (
    "tests/test_import.py",
    "tests/test_compat.py",
    "tests/test_noise.py",
    "tests/test_storage.py",
    "tests/passes/test_passes.py",
    "tests/methods/test_diffq.py",
    "tests/training/test_what_users_train_with.py",
    "tests/packed/test_packed_round_trip.py",
    "tests/export/test_onnx_export.py",
    "tests/export/test_onnx_recurrent.py",
)
"""Capture, prepare, train, convert, packed file and ONNX export."""
WITH_THE_TESTS = ("pytest>=8", "hypothesis>=6.100", "scipy>=1.11", "scikit-learn>=1.3")


@dataclass(frozen=True)
class Row:
    """One environment: a Python, and the versions that are asked for beyond what pyproject.toml says."""

    name: str
    python: str
    packages: tuple[str, ...] = ()


ROWS = (
    Row("oldest", "3.10", ("torch==2.5.1", "numpy==1.26.4", "onnx==1.20.0", "onnxruntime==1.23.2", "onnxscript==0.7.1", "onnx-ir==1.0.0")),
    Row("oldest ONNX export", "3.13", ("torch==2.9.1", "onnx==1.20.0", "onnxruntime==1.24.1", "onnxscript==0.7.1", "onnx-ir==1.0.0")),
    Row("pinned", "3.11", ("--constraint", "constraints.txt")),
    Row("middle", "3.12", ("torch==2.12.1", "onnx==1.21.0", "onnxruntime==1.26.0")),
    Row("newest", "3.14"),
)


def run_row(row: Row, python: str, folder: Path, keep: bool) -> dict[str, object]:
    """Make the environment of a row, run the tests in it, and say what came of them."""
    folder.mkdir(parents=True, exist_ok=True)
    log, source, bin_folder = folder / "log.txt", folder / "source", folder / "venv" / "bin"
    try:
        copy_source(source)
        with log.open("w") as out:
            install = [str(bin_folder / "pip"), "install", str(source), *WITH_THE_TESTS, *row.packages]
            for command in ([] if bin_folder.exists() else [[python, "-m", "venv", str(folder / "venv")]]) + [install]:
                if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode:
                    return {"why": last_error(log.read_text())}
            shutil.rmtree(source / "diffq_fx")  # the installed package is tested, not this copy
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
            report = folder / "report.xml"
            pytest = [
                str(bin_folder / "python"),
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-m",
                "not slow",
                f"--junit-xml={report}",
                *TESTS,
            ]
            subprocess.run(pytest, stdout=out, stderr=subprocess.STDOUT, cwd=source, env=environment, check=False)
        versions = subprocess.run([str(bin_folder / "python"), "-c", VERSIONS, *SHOWN], capture_output=True, text=True, check=True)
        return {"versions": json.loads(versions.stdout), **counts(report)}
    finally:
        shutil.rmtree(source, ignore_errors=True)
        if not keep:
            shutil.rmtree(folder / "venv", ignore_errors=True)


VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps({"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in sys.argv[1:]}}))
"""


def copy_source(target: Path) -> None:
    """Copy what git knows of the repository, as it is now."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def last_error(log: str) -> str:
    """What pip says stopped it."""
    errors = [line.strip() for line in log.splitlines() if line.startswith(("ERROR", "Error"))]
    return errors[-1] if errors else (log.strip().splitlines() or ["no output"])[-1]


def counts(report: Path) -> dict[str, object]:
    """Passed, failed and skipped tests of a JUnit report, and how often each reason was given."""
    if not report.exists():
        return {"why": "pytest did not run"}
    passed, reasons = 0, {"failed": collections.Counter(), "skipped": collections.Counter()}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        failure, skipped = next((each for each in case if each.tag in ("failure", "error")), None), case.find("skipped")
        if failure is not None:
            reasons["failed"][f"{case.get('name')}: {first_line(failure.get('message'))}"] += 1
        elif skipped is not None:
            reasons["skipped"][first_line(skipped.get("message"))] += 1
        else:
            passed += 1
    return {"passed": passed, **{name: dict(found) for name, found in reasons.items()}}


def first_line(message: str | None, longest: int = 200) -> str:
    """One line of a message, without paths and addresses of this machine."""
    line = (message or "").strip().splitlines()[0] if (message or "").strip() else "no message"
    return re.sub(r"(/[\w.+-]+){3,}/", ".../", re.sub(r"0x[0-9a-f]+", "0x...", line))[:longest]


def table(results: dict[str, dict]) -> str:
    """The results as markdown: one line for each row, and below what did not work."""
    header = ["row", "date", "Python", *SHOWN, "passed", "failed", "skipped"]
    lines, notes = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)], []
    for row in ROWS:
        result = results.get(row.name, {"why": "not run"})
        versions = result.get("versions", {"Python": row.python})
        numbers = [result["passed"], *(sum(result[kind].values()) for kind in ("failed", "skipped"))] if "passed" in result else ["-"] * 3
        lines.append(
            "| "
            + " | ".join([row.name, result.get("date", "-"), *(versions.get(name, "-") for name in ("Python", *SHOWN)), *map(str, numbers)])
            + " |"
        )
        if "why" in result:
            notes.append(f"- {row.name}: {result['why']}")
        for kind in ("failed", "skipped"):
            for reason, times in sorted(result.get(kind, {}).items(), key=lambda pair: -pair[1]):
                notes.append(f"- {row.name}: {times} {kind}: {reason}")
    return "\n".join([*lines, "", "What did not run, and why:", "", *notes])


def main() -> int:
    """Run the rows that are asked for and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {[row.name for row in ROWS]}; all without any")
    parser.add_argument("--python", help="the interpreter, for one row")
    parser.add_argument("--keep", action="store_true", help="keep the environments under .matrix")
    options = parser.parse_args()
    unknown = set(options.rows) - {row.name for row in ROWS}
    if unknown or (options.python and len(options.rows) != 1):
        parser.error(f"unknown rows {sorted(unknown)}" if unknown else "--python is for one row")
    stored = RESULTS / f"matrix_{platform.machine()}.json"
    for row in ROWS:
        if options.rows and row.name not in options.rows:
            continue
        python = options.python or shutil.which(f"python{row.python}")
        result: dict = {"why": f"there is no python{row.python} on the PATH"}
        if python is not None:
            result = run_row(row, python, ROOT / ".matrix" / row.name.replace(" ", "-"), options.keep)
        results = json.loads(stored.read_text()) if stored.exists() else {}  # only now: rows may be run side by side
        results[row.name] = result | {"asked": asdict(row), "date": datetime.date.today().isoformat()}
        stored.write_text(json.dumps(results, indent=1) + "\n")
        stored.with_suffix(".md").write_text(f"{TITLE}\n\n{platform.machine()}, Linux. {EXPLAINED}\n\n{table(results)}\n")
        print(f"{row.name}: {result.get('why') or {kind: result[kind] for kind in ('passed', 'failed')}}", flush=True)
    return int(any("why" in result or result["failed"] for result in json.loads(stored.read_text()).values()))


TITLE = "# The versions that the package works with\n\n    make matrix"
EXPLAINED = """Each row is an environment of its own with the package installed; the tests are those of `benchmarks/version_matrix.py`.
A row is of the package as it was on its date, and what was mended since still stands below as failed; `python -m
benchmarks.version_matrix newest` makes one row anew."""

if __name__ == "__main__":
    sys.exit(main())
