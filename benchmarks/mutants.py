"""Mutation testing: small changes of the package's core, each in a process of its own, and the tests that notice them.

    python -m venv .mutants/venv && .mutants/venv/bin/pip install -c constraints.txt -e '.[dev]' coverage
    python -m benchmarks.mutants measure   # which test runs which line, and how long it takes
    python -m benchmarks.mutants run --sample 40   # goes on where it was stopped; --seed 1: of those that no other seed has drawn
    python -m benchmarks.mutants again     # the survivors that are not explained, after tests were written or code has gone
    python -m benchmarks.mutants report

A mutant meets the tests of the gate that run its line, the fastest first and those that killed others of its module before the rest,
until one fails or they have taken ``--seconds``; in five times that it counts as timed out. A process that has imported the package and
collected the tests is forked for each, and the function that is changed gets other code; what is changed outside of functions is
imported anew. A test that fails without the change, alone, kills nothing.
"""

import argparse
import ast
import collections
import json
import os
import random
import time
from functools import cache, partial

import pytest

from benchmarks._mutant_report import explained, seed_of, write_report
from benchmarks._mutant_runs import QUIET, ROOT, Server, imported_anew, in_a_fork
from benchmarks._mutations import changes_of
from benchmarks._result import RESULTS

KEPT, RECORDS = ROOT / ".mutants", RESULTS / "mutants.jsonl"
AREAS = {
    "passes": ["passes/*"],
    "maths": [
        "functional/*",
        *(f"kernels/{name}.py" for name in ("derivatives", "draws", "eager")),
        "methods/mapping.py",
        "methods/predicted_loss.py",
    ],
    "size and its controller": ["budget/*", "storage/*"],
    "packed format": ["export/packed/*"],
    "layout rules": ["export/onnx/layout/*"],
}
WITHOUT_RULES = {"diffq_fx/export/onnx/layout/profiles.py"}  # measured times
TESTS = [
    *(f"tests/{folder}" for folder in ("passes", "packed", "methods", "export", "training", "post_training")),
    *(
        f"tests/test_{name}.py"
        for name in ("bits_gradient", "codebooks", "device_steps", "dtypes_of_converted", "errors", "formulas", "functional")
    ),
    *(f"tests/test_{name}.py" for name in ("kernels", "noise", "operators", "ranges", "several_parts", "storage", "what_is_stored")),
]


def modules() -> dict[str, str]:
    """Each module to change, and its area."""
    found = {
        str(path.relative_to(ROOT)): area for area, globs in AREAS.items() for each in globs for path in (ROOT / "diffq_fx").glob(each)
    }
    return {path: area for path, area in found.items() if path.endswith(".py") and path not in WITHOUT_RULES and mutants_of(path)}


@cache
def mutants_of(path: str) -> list[dict]:
    """All mutants of a module; what tells one from the others holds as lines above it come and go."""
    seen: collections.Counter[tuple] = collections.Counter()
    mutants = []
    for number, change in enumerate(changes_of(ast.parse((ROOT / path).read_text()))):
        what = change.function, f"{change.before} -> {change.after}"
        key = f"{path}:{what[0]}:{what[1]}:{seen[what]}"
        seen[what] += 1
        mutants.append({"key": key, "module": path, "line": change.line, "function": what[0], "change": what[1], "number": number})
    return mutants


class Measure:
    """Notes of every test its seconds, and the lines it covers; adds to what is known of others."""

    def __init__(self, coverage, end: float) -> None:
        self.coverage, self.end, self.seconds = coverage, end, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.switch_context(item.nodeid)
        begun = time.process_time()
        result = yield
        self.seconds[item.nodeid] = round(time.process_time() - begun, 3)
        self.coverage.switch_context("")
        if time.monotonic() > self.end:
            item.session.shouldstop = "the time is over"
        return result


def measure(tests: list[str], minutes: float) -> None:
    from coverage import Coverage

    KEPT.mkdir(exist_ok=True)
    coverage = Coverage(data_file=str(KEPT / "coverage"), branch=True, include=[str(ROOT / path) for path in modules()])
    seconds = KEPT / "seconds.json"
    known = json.loads(seconds.read_text()) if seconds.exists() else {}
    coverage.load()
    coverage.start()
    plugin = Measure(coverage, time.monotonic() + 60 * minutes)
    pytest.main([*QUIET, *tests], plugins=[plugin])
    coverage.stop()
    coverage.save()
    coverage.json_report(outfile=str(KEPT / "coverage.json"))
    seconds.write_text(json.dumps({**known, **plugin.seconds}))


class Covering:
    """Which tests meet a mutant, in which order, and how long they may take."""

    def __init__(self, most_seconds: float, first: list[str]) -> None:
        from coverage import CoverageData

        data = CoverageData(str(KEPT / "coverage"))
        data.read()
        self.most, self.first, self.seconds = most_seconds, first, json.loads((KEPT / "seconds.json").read_text())
        self.lines = {path: data.contexts_by_lineno(str(ROOT / path)) for path in modules()}
        self.kills: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    def tests_of(self, mutant: dict) -> list[str]:
        lines, kills, left = self.lines[mutant["module"]], self.kills[mutant["module"]], self.most
        ran = set(lines.get(mutant["line"], ())) if mutant["function"] else {each for tests in lines.values() for each in tests}
        ran |= {name for name in self.seconds if self.first and name.startswith(tuple(self.first))}
        chosen: list[str] = []
        for test in sorted(ran & self.seconds.keys(), key=lambda each: (self.seconds[each] + 0.01) / (1 + 4 * kills[each])):
            left -= self.seconds[test]
            if left < 0:
                break
            chosen.append(test)
        return chosen

    def limit_of(self, tests: list[str]) -> int:
        """Seconds of CPU, five times those of the sound code."""
        return 10 + int(5 * sum(self.seconds[each] for each in tests))


def records() -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = collections.defaultdict(list)
    if RECORDS.exists():
        for line in RECORDS.read_text().splitlines():
            record = json.loads(line)
            found[record["key"]].append(record)
    return found


def run(mutants: list[dict], covering: Covering, seed: int, minutes: float) -> None:
    """Those in functions in forks of a process that has collected the tests, the others in forks of this one."""
    screen, end = os.dup(2), time.monotonic() + 60 * minutes

    def report(mutant: dict, result: dict, tests: int) -> None:
        if result["outcome"] == "killed" and result.get("test"):
            covering.kills[mutant["module"]][result["test"]] += 1
        kept = {name: mutant[name] for name in ("key", "module", "line", "function", "change")}
        with RECORDS.open("a") as file:
            file.write(json.dumps({**kept, "seed": seed, "tests": tests, **result}) + "\n")
        os.write(
            screen, f"{result['outcome']} {result['seconds']} s {mutant['module']}:{mutant['line']} {mutant['change'][:80]}\n".encode()
        )

    def is_over() -> bool:
        return time.monotonic() > end

    import hypothesis  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch.fx  # noqa: F401

    is_inside = {each["key"]: bool(each["function"]) and "super()" not in each["change"] for each in mutants}  # code without it has no cell
    inside, outside = ([each for each in mutants if is_inside[each["key"]] == which] for which in (True, False))
    files = sorted({test.split("::")[0] for mutant in inside for test in covering.tests_of(mutant)})
    process = os.fork() if inside else None
    if process == 0:
        pytest.main([*QUIET, *files], plugins=[Server(inside, covering.tests_of, covering.limit_of, report, is_over)])
        os._exit(0)
    if process:
        os.waitpid(process, 0)
    for mutant in outside:
        if not is_over():
            tests = covering.tests_of(mutant)
            report(mutant, in_a_fork(partial(imported_anew, mutant, tests), 10 + covering.limit_of(tests)), len(tests))


def sampled(size: int, seed: int, only: str, known: dict[str, list[dict]]) -> list[dict]:
    """What is left to run of the first of every module's mutants in an order by chance, without those that another seed has drawn."""
    rows = []
    for path in modules():
        if only in path:
            order = list(mutants_of(path))
            random.Random(f"{seed}:{path}").shuffle(order)
            rows += enumerate([each for each in order if seed_of(known.get(each["key"], [{"seed": seed}])) == seed][:size])
    return [mutant for _, mutant in sorted(rows, key=lambda row: row[0]) if mutant["key"] not in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "run", "again", "report"])
    parser.add_argument("--sample", type=int, default=40, help="mutants of a module")
    parser.add_argument("--seed", type=int, default=0, help="run: another one draws mutants that were never run")
    parser.add_argument("--seconds", type=float, default=12.0, help="of tests that a mutant meets at most")
    parser.add_argument("--only", default="", help="a part of the modules' paths")
    parser.add_argument("--tests", nargs="*", default=[], help="measure: files; run, again: names of tests that each mutant meets first")
    parser.add_argument("--note", default="", help="report: what else is to be said of the run")
    parser.add_argument("--minutes", type=float, default=1e9, help="to stop after")
    given, known = parser.parse_args(), records()
    if given.step == "measure":
        measure(given.tests or [*TESTS, *modules()], given.minutes)
        return
    if given.step == "report":
        numbers = {path: len(mutants_of(path)) for path in modules()}
        left = {each["key"]: known[each["key"]] for path in modules() for each in mutants_of(path) if each["key"] in known}  # code goes
        coverage, seconds = (json.loads((KEPT / f"{name}.json").read_text()) for name in ("coverage", "seconds"))
        write_report(left, known.values(), modules(), numbers, coverage, seconds, given.note)
        return
    if given.step == "run":
        chosen = sampled(given.sample, given.seed, given.only, known)
    else:
        survived = {key for key, tries in known.items() if tries[-1]["outcome"] == "survived"} - explained().keys()
        chosen = [each for path in modules() if given.only in path for each in mutants_of(path) if each["key"] in survived]
    covering = Covering(given.seconds, given.tests)
    for last in (tries[-1] for tries in known.values() if tries[-1].get("test")):
        covering.kills[last["module"]][last["test"]] += 1
    run(chosen, covering, given.seed, given.minutes)


if __name__ == "__main__":
    main()
