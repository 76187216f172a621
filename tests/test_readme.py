"""The examples of the README and of docs/ run as they stand."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffq_fx.cli import app

README = Path(__file__).parents[1] / "README.md"


def run_examples(path):
    names = {"__name__": "examples"}
    for kind, block in re.findall(r"```(python|sh)\n(.*?)```", path.read_text(), re.DOTALL):
        if kind == "python":
            exec(compile(block, path.name, "exec"), names)
            continue
        for line in block.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "diffq-fx"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (line, result.stderr)


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(README)
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert "0.weight" in capsys.readouterr().out


DOCS = sorted(path for path in (README.parent / "docs").rglob("*.md") if "```python" in path.read_text())
PRINTED = {
    "methods.md": "('0.weight', '2.weight') {}",
    "tutorial.md": "3 bits: 0.9",
    "tracing.md": "module - ",
    "size.md": "2.",
    "runtimes.md": "{'batch': 2, 'ids_1': 7} {4: 6400}",
    "method.md": "_quantizer",
    "gguf.md": "True\nTrue",
    "hugging-face.md": "True\nTrue",
    "onnxruntime-genai.md": "HeldWeight(bits=8, container_bits=8, group_size=64)\nTrue\n{'shared_embeddings': 'false'}",
    "language-models.md": "True True\n8 False\nTrue",
    "onnx-layouts.md": "0.weight {4: 1048576} linear - fused, 4 bits",
    "decoders.md": "(1, 10, 256)",
}
"""A part of what some of them print."""


NEEDED = {
    "methods.md": ("torchao",),
    "tutorial.md": ("sklearn",),
    "gguf.md": ("transformers", "gguf"),
    "hugging-face.md": ("transformers", "torchao"),
    "onnxruntime-genai.md": ("transformers", "onnxruntime_genai"),
    "language-models.md": ("transformers", "peft"),
    "decoders.md": ("transformers",),
    "trainers.md": ("accelerate", "lightning"),
}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_the_examples_of_the_documentation_run(path, tmp_path, monkeypatch, capsys):
    for package in NEEDED.get(path.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    run_examples(path)
    assert PRINTED.get(path.name, "") in capsys.readouterr().out


def test_every_page_is_in_the_navigation_of_the_site():
    pages = {str(path.relative_to(README.parent)) for path in (README.parent / "docs").rglob("*.md")}
    navigation = (README.parent / "mkdocs.yml").read_text()
    assert not {page for page in pages if page not in navigation}


def test_the_paths_that_texts_name_exist():
    root = README.parent
    texts = "".join(
        path.read_text() for path in (root / "CONTRIBUTING.md", root / "benchmarks" / "README.md", *(root / "docs").rglob("*.md"))
    )
    named = set(re.findall(r"`([\w/]+(?:/|\.py|\.c))`", texts))
    assert len(named) > 40
    assert not [
        name
        for name in named
        if not any((root / top / name).exists() for top in (".", "benchmarks", "diffq_fx", "diffq_fx/kernels", "diffq_fx/post_training"))
    ]
    modules = set(re.findall(r"-m ((?:benchmarks|recipes)\.[a-z_]+)", texts))
    assert len(modules) > 10
    assert not [name for name in modules if importlib.util.find_spec(name) is None]


def test_benchmarks_run_as_modules_from_the_root():
    root = README.parent
    for path in (*(root / "benchmarks").glob("*.py"), root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")):
        assert not re.findall(r"^\s*from _[a-z]\w* import|python benchmarks/", path.read_text(), re.MULTILINE), path


def test_it_stays_short():
    assert len(README.read_text().splitlines()) <= 120
