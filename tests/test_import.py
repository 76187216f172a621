"""``import diffq_fx`` stays light, and the public names are the ones that are meant."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffq_fx

HEAVY = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "torchao",
    "matplotlib",
    "rich",
    "typer",
    "safetensors",
    "constriction",
    "isal",
    "sklearn",
    "triton",
)


def test_import_is_light():
    code = f"import sys, diffq_fx; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_have_docstrings():
    for name in diffq_fx.__all__:
        assert getattr(diffq_fx, name).__doc__, name


@pytest.mark.parametrize(
    ("folder", "above"), [("passes", "capture|prepare|convert|training|export"), ("capture", "passes|prepare|convert|training|export")]
)
def test_capture_and_passes_know_nothing_of_each_other(folder, above):
    for path in (Path(diffq_fx.__file__).parent / folder).glob("*.py"):
        assert not re.findall(rf"^\s*(?:from|import) diffq_fx\.(?:{above})\b", path.read_text(), re.M), path.name
