"""``import diffq_fx`` stays light, and the public names are the ones that are meant."""

import subprocess
import sys

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
