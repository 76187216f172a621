"""``import diffq_fx`` stays light, a report and the command line too; and the public names are the ones that are meant."""

import subprocess
import sys

import diffq_fx

WHAT_IS_LOADED = """
import sys, torch, diffq_fx

def refuse(*names):
    assert not (found := [name for name in names if name in sys.modules]), found

onnx = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")
others = ("torchao", "safetensors", "constriction", "isal", "sklearn", "triton")
refuse("matplotlib", "rich", "typer", *onnx, *others)
report = diffq_fx.bits_report(diffq_fx.prepare_diffq(torch.nn.Linear(64, 64), torch.zeros(1, 64)))
report.as_dict()
refuse("matplotlib", "rich", *onnx, "torchao")
report.save_picture(sys.argv[1])
refuse("matplotlib.pyplot", *onnx, "torchao")
import diffq_fx.cli
refuse(*onnx, "sklearn")
"""


def test_what_is_imported_when(tmp_path):
    """One process for all, since each imports torch: the library, a report's numbers, its picture, the command line's help."""
    done = subprocess.run([sys.executable, "-c", WHAT_IS_LOADED, tmp_path / "picture.png"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").stat().st_size


def test_public_names_exist_and_have_docstrings():
    for name in diffq_fx.__all__:
        assert getattr(diffq_fx, name).__doc__, name
