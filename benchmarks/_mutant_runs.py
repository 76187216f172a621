"""Mutants in processes of their own: forks of one that has collected the tests, or of one that has imported all but the package."""

import collections
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from benchmarks._mutations import mutated

ROOT = Path(__file__).parent.parent
QUIET = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--doctest-modules"]
SPARE_BYTES = 2**32


class Server:
    """In place of pytest's run of the tests: a fork for each mutant of a function.

    Args:
        mutants: each with its ``module``, its ``number`` there, and what else its report needs.
        tests_of: names of the tests that meet a mutant, in their order.
        limit_of: seconds of CPU that some tests may take.
        report: is given each mutant, what became of it, and how many tests it met.
        is_over: no mutant is begun once this is true.
    """

    def __init__(self, mutants: list[dict], tests_of: Callable, limit_of: Callable, report: Callable, is_over: Callable[[], bool]) -> None:
        self.mutants, self.tests_of, self.limit_of, self.report, self.is_over = mutants, tests_of, limit_of, report, is_over
        self.sound: dict[str, bool] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        temporary = session.config._tmp_path_factory.getbasetemp()
        warm_up(temporary)
        functions = functions_by_place()
        gc.collect()
        gc.freeze()
        for mutant in self.mutants:
            if self.is_over():
                break
            tests, result = [items[name] for name in self.tests_of(mutant) if name in items], None
            while result is None or (result.get("test") and not self._is_sound(session, items[result["test"]])):
                tests = [each for each in tests if result is None or each.nodeid != result["test"]]
                result = in_a_fork(partial(with_other_code, mutant, functions, session, tests), self._limit(tests))
            self.report(mutant, result, len(tests))
            for left in temporary.iterdir():
                shutil.rmtree(left, ignore_errors=True)
        return True

    def _is_sound(self, session: pytest.Session, item: pytest.Item) -> bool:
        """Whether a test passes alone without the change; it is tried once."""
        if item.nodeid not in self.sound:
            self.sound[item.nodeid] = in_a_fork(partial(run_items, session, [item]), self._limit([item]))["outcome"] == "survived"
        return self.sound[item.nodeid]

    def _limit(self, items: list[pytest.Item]) -> int:
        return self.limit_of([item.nodeid for item in items])


def functions_by_place() -> dict[tuple[str, str, int], list[types.FunctionType]]:
    """The package's functions by file, name and first line."""
    found = collections.defaultdict(list)
    for each in gc.get_objects():
        if type(each) is types.FunctionType and "diffq_fx" in each.__code__.co_filename:
            found[each.__code__.co_filename, each.__code__.co_qualname, each.__code__.co_firstlineno].append(each)
    return found


def with_other_code(mutant: dict, functions: dict, session: pytest.Session, tests: list[pytest.Item]) -> str | None:
    """In the fork: put the changed function in place, forget what was kept of the sound one, and run."""
    path = ROOT / mutant["module"]
    tree, change = mutated(path.read_text(), mutant["number"])
    place = str(path), change.function, change.first_line
    for function in functions[place]:
        function.__code__ = next(
            each for each in _codes(compile(tree, path, "exec")) if (each.co_qualname, each.co_firstlineno) == place[1:]
        )
    if place not in functions:
        raise LookupError(f"no function {change.function} at line {change.first_line}")
    for module in [module for name, module in sys.modules.items() if name.startswith("diffq_fx")]:
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()
    return run_items(session, tests)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _codes(each)


def run_items(session: pytest.Session, items: list[pytest.Item]) -> str | None:
    """The name of the first test that fails."""
    for item, following in zip(items, [*items[1:], None], strict=False):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return item.nodeid
    return None


def imported_anew(mutant: dict, tests: list[str]) -> str | None:
    """In a fork of a process without the package: import it changed, and run the tests."""
    path = ROOT / mutant["module"]
    tree, _ = mutated(path.read_text(), mutant["number"])
    code, read = compile(tree, path, "exec"), SourceFileLoader.get_code
    SourceFileLoader.get_code = lambda self, name: code if self.path == str(path) else read(self, name)
    failed: list[str] = []

    class First:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.append(report.nodeid)

    plain = "--assert=plain"  # else pytest reads the file of a doctest itself, without the change
    status = pytest.main([*QUIET, plain, "-x", *tests], plugins=[First()])
    return failed[0] if failed else None if status == 0 else "the import"


def in_a_fork(run: Callable[[], str | None], limit: int) -> dict:
    """What became of a mutant: ``survived``, ``killed`` by a test or by a crash, ``timed out``, or ``not run`` by a fault of ours."""
    reading, writing = os.pipe()
    begun = time.monotonic()
    process = os.fork()
    if process == 0:
        os.close(reading)
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for each in (0, 1, 2):
            os.dup2(null, each)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            answer = {"test": run()}
        except BaseException as error:  # noqa: BLE001  whatever it is, the process ends here
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    ended_by = _wait(process, 60 + 20 * limit)
    with os.fdopen(reading) as pipe:
        answer = json.loads(pipe.read() or "{}") if ended_by == 0 else {}
    if ended_by in (None, signal.SIGXCPU, signal.SIGKILL):
        outcome = "timed out"
    else:
        outcome = "not run" if "error" in answer else "killed" if ended_by or answer.get("test") else "survived"
    return {**answer, "outcome": outcome, "ended_by": ended_by, "seconds": round(time.monotonic() - begun, 1)}


def _wait(process: int, limit: float) -> int | None:
    """The signal that ended a process, 0 for none, None if it had to be ended."""
    end = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.01)


def warm_up(folder: Path) -> None:
    """What every first call does once: torch's exporter, the package's late imports."""
    import torch

    from diffq_fx import DiffQConfig, convert, prepare
    from diffq_fx.export import export_onnx, load_packed, save_packed

    x = torch.randn(4, 64)
    prepared = prepare(torch.nn.Linear(64, 64), (x,), DiffQConfig())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    prepared(x).sum().backward()
    optimizer.step()
    converted = convert(prepared)
    load_packed(torch.nn.Linear(64, 64), save_packed(converted, folder / "warm.safetensors"))
    export_onnx(converted, (x,), folder / "warm.onnx")
