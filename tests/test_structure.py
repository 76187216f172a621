"""The order of the package: nothing imports what is built on top of it, so there is no cycle between folders, and none between files."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "diffq_fx"
ORDER = (
    "errors _compat atomic functional weights kernels sharded budget storage parts methods example selection passes capture compression "
    "unfit model_size training prepare convert report export integrations demo cli __init__ __main__"
).split()
"""From the ground up: each imports what stands before it."""


def imports():
    """(importing file, imported module) of every import at the run of the package, types alone left out."""
    modules = {
        ".".join(("diffq_fx", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")
    }
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        typing = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffq_fx") and id(node) not in typing:
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


def test_no_two_files_need_each_other():
    needs = {}
    for name, found in imports():
        if name != found and not name.startswith(f"{found}."):
            needs.setdefault(name, set()).add(found)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {error.args[1]}")
