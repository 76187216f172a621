"""Exported files on other processors: a file of each layout rule, run by emulators, against PyTorch and against the run on this machine.

``apt-get install qemu-user`` brings the emulators; ``make processors`` also fetches a Python and an onnxruntime for Arm.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_models import Conv, Linear, Parallel, store
from torch import nn
from torch.nn import functional as F

from diffq_fx import convert, prepare
from diffq_fx.export import export_onnx
from diffq_fx.methods import LC

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("processors"),
    pytest.mark.filterwarnings("ignore:export_onnx. rounding activations changes"),
]
ROWS, IMAGE, IDS = torch.randn(32, 256), torch.randn(1, 32, 6, 6), torch.arange(12).reshape(3, 4)
ARM = os.environ.get("DIFFQ_FX_ARM")
"""Folder with the root of a Debian for Arm and packages for its Python: see benchmarks/arm_root.sh."""
ROUNDED = {"linear": 0.02, "qdq": 0.02, "dynamic": 0.015, "int8": 0.05}
"""Rules whose activations onnxruntime rounds to 8 bits: how far that may take outputs from PyTorch's, in parts of the largest."""


class Picked(nn.Module):
    """An embedding."""

    def __init__(self, words, size, bits):
        super().__init__()
        self.table = store(torch.randn(words, size), bits, name="table")

    def forward(self, ids):
        return F.embedding(ids, self.table())


def same_size(x, weight):
    return F.conv2d(x, weight, padding=1)


def files():
    """Rule -> a converted model all of whose weights it takes, the input, arguments of the export."""
    torch.manual_seed(0)
    widths = ((2, "affine"), (4, "symmetric"), (8, "affine"))
    product = Parallel(*(Linear(512, 512, bits, name=f"w{bits}", grid=grid) for bits, grid in widths))
    mixed = Linear(256, 256, torch.tensor([2, 3, 5, 8]).repeat(64).view(-1, 1), name="mixed")
    integer = Parallel(*(Linear(256, 384, bits, name=f"d{bits}") for bits in (4, 7, 8)), Linear(256, 384, 8, name="s8", grid="symmetric"))
    convolutions = nn.Sequential(*(Conv(same_size, (32, 32, 3, 3), bits, name=f"c{bits}") for bits in (4, 6, 7, 8)))
    coded = convert(prepare(nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8)), ROWS, LC(entries=5)))
    return {
        "linear": (product, torch.randn(1, 512), {}),
        "fold": (mixed, ROWS, {}),
        "rows": (Picked(1024, 256, 5), IDS, {}),
        "codebook": (coded, ROWS, {}),
        "qdq": (product, torch.randn(1, 512), {"layout": "qdq"}),
        "dynamic": (integer, ROWS, {"activations": "dynamic"}),
        "int8": (convolutions, IMAGE, {"activations": "int8", "calibration": [IMAGE]}),
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the files, run on this machine, and what PyTorch computes."""
    folder, expected = tmp_path_factory.mktemp("files"), {}
    for rule, (model, x, settings) in files().items():
        result = export_onnx(model.eval(), x, folder / f"{rule}.onnx", **settings)
        assert {record.rule for record in result.weights} == {rule}
        if rule in ("dynamic", "int8"):
            assert {record.products for record in result.weights} == {("int8",), ("uint8",)}, "both kinds of exact products"
        found = model(x)
        expected[rule] = [each.detach().numpy() for each in (found if isinstance(found, tuple) else (found,))]
        np.save(folder / f"{rule}.npy", x.numpy())
    run(folder, "here", [sys.executable])
    return folder, expected


def run(folder, label, python):
    command = [*python, str(Path(__file__).with_name("run_exported.py")), str(folder), label]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def outputs(folder, rule, label):
    with np.load(folder / f"{rule}.{label}.npz") as found:
        return [found[key] for key in found.files]


def emulated(processor):
    """The command that starts Python on this processor."""
    if processor == "arm64":
        if not ARM:
            pytest.skip("DIFFQ_FX_ARM names no root of Arm (make processors)")
        root, emulator = Path(ARM).resolve(), shutil.which("qemu-aarch64")
        python = ["-L", str(root), "-E", f"PYTHONHOME={root}/usr", "-E", f"PYTHONPATH={root}/site", f"{root}/usr/bin/python3.11"]
    else:
        emulator, python = shutil.which("qemu-x86_64"), ["-cpu", processor, os.path.realpath(sys.executable)]
        python[2:2] = ["-E", f"PYTHONPATH={Path(np.__file__).parents[1]}"]
    if emulator is None:
        pytest.skip("qemu-user is not installed")
    return [emulator, *python]


@pytest.fixture(scope="module", params=["Haswell", "arm64"])
def processor(request, exported):
    """One on which the files have been run."""
    run(exported[0], request.param, emulated(request.param))
    return request.param


@pytest.mark.parametrize("rule", ["linear", "fold", "rows", "codebook", "qdq", "dynamic", "int8"])
def test_a_file_computes_the_same_on_another_processor(exported, processor, rule):
    folder, expected = exported
    for found, here, wanted in zip(outputs(folder, rule, processor), outputs(folder, rule, "here"), expected[rule], strict=True):
        largest = float(np.abs(wanted).max())
        from_torch, from_here = (float(np.abs(found - other).max()) / largest for other in (wanted, here))
        print(f"{processor}, {rule}: {from_torch:.2g} from PyTorch, {from_here:.2g} from this machine")  # noqa: T201 - what `make processors` is for
        assert from_torch < ROUNDED.get(rule, 1e-4)
        if rule in ("dynamic", "int8"):  # rounded by operators of the file; inside fused products each kernel has its own way
            assert from_here < 1e-3
