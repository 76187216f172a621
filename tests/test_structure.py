"""The order of the package, in which nothing imports what is built on top of it; names and documentation."""

import ast
import importlib
import inspect
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "diffq_fx"
ORDER = (
    "errors _compat arguments atomic file_kinds threads functional weights kernels sharded budget storage parts runtimes methods example selection passes capture compression "
    "unfit model_size training hub prepare convert post_training report export integrations demo cli __init__ __main__"
).split()
"""From the ground up: each imports what stands before it."""


def imports():
    """(importing file, imported module) of every import, those for types alone too."""
    modules = {
        ".".join(("diffq_fx", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")
    }
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffq_fx"):
                for alias in node.names:
                    longer = f"{node.module}.{alias.name}"
                    yield name, longer if longer in modules else node.module


def place(module):
    return [*module.split("."), "__init__"][1]


def test_folders_import_what_is_below_them():
    wrong = {
        f"{name} imports {found}"
        for name, found in imports()
        if ORDER.index(place(name)) < ORDER.index(place(found)) and found != "diffq_fx"
    }
    assert not wrong


def test_the_picture_in_contributing_is_the_order():
    picture = (ROOT.parent / "CONTRIBUTING.md").read_text().split("```")[1]
    rows = [
        [name.split("/")[0] for name in re.split(r" {2,}", line[:45].strip())] for line in picture.splitlines() if line[:45].strip(" |")
    ]
    places = [name for row in rows for name in dict.fromkeys(row)]
    assert len(places) > 20
    drawn = [(place(name), place(found)) for name, found in imports() if {place(name), place(found)} <= set(places)]
    assert not {pair for pair in drawn if places.index(pair[0]) > places.index(pair[1])}


def test_no_two_files_need_each_other():
    needs = {}
    for name, found in imports():
        if name != found:
            needs.setdefault(name, set()).add(found)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {error.args[1]}")


PUBLIC = ("diffq_fx diffq_fx.export diffq_fx.export.gguf diffq_fx.training.ipq diffq_fx.training.lc diffq_fx.integrations.torchao").split()
"""The modules with functions that the README and docs/ name."""


@pytest.mark.parametrize("module", PUBLIC)
def test_what_users_call_is_documented(module):
    if (package := module.rpartition(".")[2]) in ("torchao", "gguf"):
        pytest.importorskip(package)
    docs = "".join(path.read_text() for path in (ROOT.parent / "README.md", *(ROOT.parent / "docs").rglob("*.md")))
    public = importlib.import_module(module)
    lacking = {}
    for name, function in inspect.getmembers(public, inspect.isfunction):
        if name in getattr(public, "__all__", ()) or (function.__module__ == module and re.search(rf"\b{name}\b", docs)):
            signature = inspect.signature(function)
            needed = ["Example:"] + ["Args:"] * bool(signature.parameters) + ["Returns:"] * (signature.return_annotation is not None)
            lacking[name] = [part for part in needed if part not in (function.__doc__ or "")]
            assert "caller" not in signature.parameters, f"{name}: who calls is for messages, and no argument of what users call"
    assert not any(lacking.values()), lacking


def test_functions_have_70_lines_at_most():
    """Their docstrings left out."""
    long = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                described = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                long[f"{path.name}: {node.name}"] = node.end_lineno - node.lineno + 1 - described
    assert len(long) > 1000
    assert not {name: lines for name, lines in long.items() if lines > 70}


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in ROOT.rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == ["__init__.py"]


def test_every_test_that_the_gate_leaves_out_is_there():
    for line in (ROOT.parent / "tests" / "evidence.txt").read_text().splitlines():
        path, *_, name = line.partition("[")[0].split("::")
        assert f"def {name}(" in (ROOT.parent / path).read_text()


def test_the_lock_has_the_pins():
    """`make lock` was run after the last change of a version."""
    pins, lock = (
        {re.sub("[-_.]+", "-", name).lower(): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)}
        for text in ((ROOT.parent / name).read_text() for name in ("constraints.txt", "requirements.lock"))
    )
    assert len(lock) > 50
    assert {name: lock.get(name, version) for name, version in pins.items()} == pins
    assert (ROOT.parent / "requirements.lock").read_text().count("--hash=sha256:") > len(lock)
