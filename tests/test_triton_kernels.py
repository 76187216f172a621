"""The kernels in Triton without a GPU: interpreted beside torch's operations, and compiled for two generations of GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import gpu

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(nvidia.__file__).parent / "bin"
LOGITS = {"LOGITS": True, "CLIPS": True, "GRID": "affine", "GAUSSIAN": False}
KERNELS = {
    "noise of steps": ("add_noise", {**LOGITS, "LOGITS": False}),
    "noise of logits": ("add_noise", LOGITS),
    "noise of logits, Gaussian": ("add_noise", {**LOGITS, "GAUSSIAN": True}),
    "reduction": ("reduce_noise", {"LOGITS": True, "GAUSSIAN": False}),
    "rounding": ("round_in_range", {"GRID": "half", "LEARNED": True}),
    "slope of the range": ("slope_of_clip", {"GRID": "half"}),
}
WHOLE_NUMBERS = {"seed": "*i64"}
NUMBERS = ("min_bits", "bits_range", "gain", "reach", "clip_gain")


@pytest.fixture(scope="module")
def differences():
    script = Path(__file__).with_name("interpreted_kernels.py")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_interpreted_they_draw_the_noise_that_torch_draws(differences):
    """Steps of one and whole numbers as gradients: every product is exact, so no order or fused operation can show."""
    for name, (noisy, of_weight, of_step) in differences["noise"].items():
        assert of_weight == 0, name
        assert noisy <= (2**-7 if "bfloat16" in name else 0), name  # the interpreter cuts a bfloat16 off where a GPU rounds it
        assert of_step <= (1e-6 if "gaussian" in name else 0), name


def test_interpreted_they_find_the_ranges_and_steps_that_torch_finds(differences):
    for name, (noisy, of_weight, of_logits) in differences["logits"].items():
        assert of_weight == 0, name
        assert noisy < 1e-6, name
        assert of_logits < 1e-5, name


def test_interpreted_they_round_as_torch_does_bit_by_bit(differences):
    for name, (rounded, of_weight, of_clip) in differences["rounded"].items():
        assert rounded == of_weight == 0, name
        assert of_clip < 1e-5, name


def compiled(name, layout, architecture, constants, dtype="fp32"):
    kernel = getattr(gpu.kernels(), name)
    tile = gpu.tile_of(layout)
    warps, constants = tile.pop("num_warps"), {**constants, **tile}
    count, block = layout.columns // layout.block, layout.block
    values = {"count": count, "block": block, "row_stride": count, "width_row": count, "width_group": int(count > 1)}
    constants |= {each: value for each, value in values.items() if value == 1 and each in kernel.arg_names}  # as Triton does
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in values or argument in NUMBERS:
            signature[argument] = "i32" if argument in values else "fp32"
        else:
            signature[argument] = WHOLE_NUMBERS.get(argument, f"*{dtype}" if argument in ("weight", "grad", "out") else "*fp32")
        if signature[argument].startswith("*") or values.get(argument, 1) % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(each),): value for each, value in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("group_size", "architecture", "kernel"),
    [("channel", architecture, kernel) for architecture in (80, 90) for kernel in KERNELS]
    + [(8, 80, "noise of logits"), (8, 90, "noise of logits"), (8, 90, "reduction"), (4, 90, "noise of logits"), (4, 90, "rounding")],
)
def test_compiled_no_register_is_spilled_and_four_weights_are_read_at_once(kernel, group_size, architecture, tmp_path):
    name, constants = KERNELS[kernel]
    made = compiled(name, GroupLayout.of(4096, 4096, group_size), architecture, constants)
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (int(re.search(rf"{part}:(\d+)", usage)[1]) for part in ("REG", "STACK", "LOCAL"))
    assert (stack, local) == (0, 0), usage
    assert registers <= 128, usage  # four blocks of four warps on a multiprocessor
    code = subprocess.run([TOOLS / "nvdisasm", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    reads, writes = (re.findall(rf"\b{operation}\.E\S*\.128\b", code) for operation in ("LDG", "STG"))
    per_thread = 2048 // 128 // 4
    assert len(reads) >= per_thread * (2 if "logits" in kernel or kernel == "slope of the range" else 1), code
    assert name not in ("add_noise", "round_in_range") or len(writes) >= per_thread, code


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("kernel", "rows", "columns", "group_size", "dtype"),
    [
        ("noise of logits", 64, 27, "channel", "fp32"),
        ("reduction", 7, 96, 12, "bf16"),
        ("rounding", 9, 3000, 1, "fp16"),
        ("slope of the range", 64, 27, 3, "bf16"),
    ],
)
def test_compiled_odd_shapes_and_half_precision_too(kernel, rows, columns, group_size, dtype):
    name, constants = KERNELS[kernel]
    assert compiled(name, GroupLayout.of(rows, columns, group_size), 80, constants, dtype).asm["cubin"]
