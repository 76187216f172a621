"""The table of mutants, and each that survived at first: what kills it now, or why nothing can."""

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks._result import RESULTS, markdown_table, write_result

EXPLAINED = RESULTS / "mutants_explained.jsonl"
COMMANDS = "python -m benchmarks.mutants measure, run, again, report"
COLUMNS = ["mutants", "run", "killed", "timed out", "killed later", "equivalent", "left"]


def write_report(
    known: Mapping[str, list[dict]],
    seen: Iterable[list[dict]],
    areas: Mapping[str, str],
    numbers: Mapping[str, int],
    coverage: dict,
    seconds: Mapping[str, float],
    note: str,
) -> Path:
    """Write the result file.

    Args:
        known: key of each mutant -> its records, one for each time that it was tried.
        seen: the same with those of lines that are gone.
        areas: each module, and its area.
        numbers: of mutants of each module.
        coverage: report of the package coverage as JSON.
        seconds: of each test that was measured.
        note: what else is to be said of the run.
    """
    why = explained()
    rows, sums, looks = [], collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    for path, area in areas.items():
        own = [tries for tries in known.values() if tries[0]["module"] == path and tries[-1]["outcome"] != "not run"]
        branches = coverage["files"][path]["summary"]
        counts = collections.Counter(
            mutants=numbers[path], run=len(own), branches=branches["num_branches"], covered=branches["covered_branches"]
        )
        counts.update(_outcome(tries, why) for tries in own)
        rows.append((path.removeprefix("diffq_fx/"), counts))
        first = collections.Counter(_outcome(tries[:1], why) for tries in seen if tries[0]["module"] == path and seed_of(tries))
        first.update(run=first.total(), **{each: counts[each] for each in ("mutants", "branches", "covered")})
        for name in (area, "all"):
            sums[name].update(counts)
            looks[f"first look: {name}"].update(first)
    named = [*((f"**{area}**", counts) for area, counts in sums.items()), *looks.items(), *rows]
    table = markdown_table(["module", *COLUMNS, "noticed", "branch coverage"], [_row(name, counts) for name, counts in named])
    survivors = sorted(
        (tries for tries in known.values() if tries[0]["outcome"] == "survived"), key=lambda tries: (tries[0]["module"], tries[0]["line"])
    )
    listed = [(_place(tries[0]), _change(tries[0]), _answer(tries, why)) for tries in survivors]
    files = ", ".join(sorted({name.split("::")[0].removeprefix("tests/") for name in seconds}))
    body = f"""{note}

{table}

Noticed: killed, timed out and killed later, of those that were run. Killed later: survived at first, and was tried again with new tests
or more of them. First look: mutants that were drawn and run once the tests of all others had been written, before any for them;
those of lines that went because of it are among them. Equivalent ones can be noticed by no test.
Branch coverage is that of the {len(seconds)} tests that were measured, not of the whole gate: {files}.

## Survivors of the first run

{markdown_table(["where", "change", "now"], listed)}"""
    return write_result("mutants", "Mutation testing of the core", body, ["torch", "pytest", "coverage", "hypothesis"], command=COMMANDS)


def seed_of(tries: list[dict]) -> int:
    """The seed that drew a mutant."""
    return tries[0].get("seed", 0)


def explained() -> dict[str, str]:
    """Key of each mutant that no test can notice -> why."""
    return {each["key"]: each["why"] for each in map(json.loads, EXPLAINED.read_text().splitlines())} if EXPLAINED.exists() else {}


def _outcome(tries: list[dict], why: Mapping[str, str]) -> str:
    """One of the columns."""
    if tries[0]["outcome"] != "survived":
        return tries[0]["outcome"]
    return "killed later" if tries[-1]["outcome"] != "survived" else "equivalent" if tries[0]["key"] in why else "left"


def _place(record: dict) -> str:
    return f"{record['module'].removeprefix('diffq_fx/')}:{record['line']}"


def _change(record: dict) -> str:
    return f"`{record['change']}`".replace("|", "\\|")


def _answer(tries: list[dict], why: Mapping[str, str]) -> str:
    if tries[-1]["outcome"] != "survived":
        return f"killed by `{tries[-1].get('test') or tries[-1]['outcome']}`".replace("|", "\\|")
    return why.get(tries[0]["key"], "survives")


def _row(name: str, counts: collections.Counter) -> list[object]:
    noticed = sum(counts[each] for each in ("killed", "timed out", "killed later"))
    branches = f"{counts['covered'] / counts['branches']:.0%} of {counts['branches']}" if counts["branches"] else "no branch"
    return [name, *(counts[each] for each in COLUMNS), f"{noticed / max(counts['run'], 1):.0%}", branches]
