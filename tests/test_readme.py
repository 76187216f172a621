"""The examples of the README and of docs/ run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def run_examples(path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    exec(compile(code, path.name, "exec"), {"__name__": "examples"})


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(README)
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert "0.weight" in capsys.readouterr().out


def test_the_examples_of_the_methods_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    run_examples(README.parent / "docs" / "methods.md")
    assert "('0.weight', '2.weight') {}" in capsys.readouterr().out


def test_the_paths_that_contributing_names_exist():
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", (README.parent / "CONTRIBUTING.md").read_text()))
    assert len(named) > 20
    missing = [name for name in named if not any((README.parent / top / name).exists() for top in ("diffq_fx", "."))]
    assert not missing


def test_it_stays_short():
    assert len(README.read_text().splitlines()) <= 120
