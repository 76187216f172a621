"""The kernels in C (noise, steps of the bits, rounding), for float32 on a CPU where a C compiler is at hand.

``kernels.c`` is compiled once per machine, in about a second, when it is first needed; the library is kept in the user's cache
folder and called by ctypes, so it depends on no version of torch. Without a compiler, or with ``DIFFQ_FX_KERNELS=torch`` in the
environment, torch's own operations do the same, slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import memory
from diffq_fx.kernels.draws import draw_seed, gaussian_table

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = (
    "-std=gnu11 -O3 -march=native -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -fopenmp -shared -fPIC".split()
)
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")
_MANY = 64
"""Logits from which on the kernel beats torch's own operations."""
_WORTH_THREADS = 1 << 14
_log = logging.getLogger(__name__)


def takes(weight: Tensor, axis: int) -> bool:
    """Whether the kernel can work on this weight here."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and axis == 0 and weight.is_contiguous() and weight.numel() > 0
    return fits and library() is not None


def add(weight: Tensor, step: Tensor, layout: GroupLayout, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Noisy weight, and the seed of its noise: int64, shape (1,)."""
    seed = draw_seed()
    out, step = memory.empty(weight.shape, weight.dtype, weight.device), step.float().contiguous()
    strides = (0 if layout.kind == "tensor" else step.shape[1], 1)
    _library().diffq_fx_add_noise(
        weight.data_ptr(),
        step.data_ptr(),
        out.data_ptr(),
        layout.rows,
        layout.columns,
        layout.block,
        *strides,
        *_draw(seed, gaussian, weight.numel()),
    )
    return out, torch.tensor([seed])


def reduce(grad: Tensor, seed: Tensor, step: Tensor, layout: GroupLayout, gaussian: bool) -> Tensor:
    """Sum over each group of ``grad * noise``, the noise made again from its seed; like ``step``."""
    grad = grad.float().contiguous()
    sums = torch.empty(layout.rows, -(-layout.columns // layout.block))
    _library().diffq_fx_reduce_noise(
        grad.data_ptr(), sums.data_ptr(), layout.rows, layout.columns, layout.block, *_draw(int(seed), gaussian, grad.numel())
    )
    return (sums.sum() if layout.kind == "tensor" else sums).reshape(step.shape).to(step.dtype)


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor, layout: GroupLayout) -> Tensor:
    """The nearest weight on an integer grid; scale, zero_point and top level per group of ``layout``."""
    out = memory.empty(weight.shape, weight.dtype, weight.device)
    scale, zero_point, top = (each.expand(scale.shape).float().contiguous() for each in (scale, zero_point, top))
    stride = 0 if layout.kind == "tensor" else scale.shape[1]
    pointers = (each.data_ptr() for each in (weight, scale, zero_point, top, out))
    _library().diffq_fx_round(*pointers, layout.rows, layout.columns, layout.block, stride, _threads(weight.numel()))
    return out


def takes_logits(logits: Tensor) -> bool:
    """Whether the kernel can work on these logits, and whether it pays."""
    fits = logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous() and logits.numel() >= _MANY
    return not recorded() and fits and library() is not None


def recorded() -> bool:
    """Whether operations are recorded by a compiler or tracer, which would miss a kernel that is called past torch."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def takes_steps(logits: Tensor, span: Tensor) -> bool:
    """Whether the kernel can make the steps of these logits, one each, and whether it pays."""
    one_each = span.dtype == logits.dtype and span.is_contiguous() and torch.broadcast_shapes(logits.shape, span.shape) == logits.shape
    return one_each and takes_logits(logits)


def steps(logits: Tensor, span: Tensor, min_bits: float, max_bits: float, gain: float) -> Tensor:
    """``span / (2^b - 1)`` with the bits of the logits, shape of ``logits``."""
    step = torch.empty_like(logits)
    strides = [0 if size == 1 else stride for size, stride in zip(span.shape, span.stride(), strict=True)]
    _library().diffq_fx_steps(
        logits.data_ptr(),
        span.data_ptr(),
        step.data_ptr(),
        *logits.shape,
        *strides,
        min_bits,
        max_bits - min_bits,
        gain,
        _threads(logits.numel()),
    )
    return step


def steps_backward(grad: Tensor, logits: Tensor, step: Tensor, min_bits: float, max_bits: float, gain: float) -> Tensor:
    """Gradient of the logits from that of the steps."""
    grad, grad_logits = grad.contiguous(), torch.empty_like(logits)
    _library().diffq_fx_steps_backward(
        *(each.data_ptr() for each in (grad, logits, step, grad_logits)),
        logits.numel(),
        min_bits,
        max_bits - min_bits,
        gain,
        _threads(logits.numel()),
    )
    return grad_logits


def bits(logits: Tensor, min_bits: float, max_bits: float, gain: float) -> tuple[Tensor, Tensor]:
    """Bits of the logits and their derivative."""
    bits, slope = torch.empty_like(logits), torch.empty_like(logits)
    _library().diffq_fx_bits(
        logits.data_ptr(), bits.data_ptr(), slope.data_ptr(), logits.numel(), min_bits, max_bits - min_bits, gain, _threads(logits.numel())
    )
    return bits, slope


def _threads(elements: int) -> int:
    """As many as torch uses, where there is work for them."""
    return torch.get_num_threads() if elements >= _WORTH_THREADS else 1


def _draw(seed: int, gaussian: bool, elements: int) -> tuple[int, int | None, int]:
    table = gaussian_table(torch.device("cpu")).data_ptr() if gaussian else None
    return seed, table, _threads(elements)


def _library() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("the noise was drawn by the C kernel, which can no longer be loaded.")
    return found


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler or the environment says no."""
    loaded = compiled(_SOURCE, _FLAGS)
    if loaded is None:
        return None
    pointer, size, word, real, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_int
    loaded.diffq_fx_add_noise.argtypes = [*[pointer] * 3, *[size] * 5, word, pointer, count]
    loaded.diffq_fx_reduce_noise.argtypes = [*[pointer] * 2, *[size] * 3, word, pointer, count]
    loaded.diffq_fx_steps.argtypes = [*[pointer] * 3, *[size] * 4, *[real] * 3, count]
    loaded.diffq_fx_steps_backward.argtypes = [*[pointer] * 4, size, *[real] * 3, count]
    loaded.diffq_fx_bits.argtypes = [*[pointer] * 3, size, *[real] * 3, count]
    loaded.diffq_fx_round.argtypes = [*[pointer] * 5, *[size] * 4, count]
    for name in ("add_noise", "reduce_noise", "steps", "steps_backward", "bits", "round"):
        getattr(loaded, f"diffq_fx_{name}").restype = None
    return loaded


def compiled(source: Path, flags: Sequence[str]) -> ctypes.CDLL | None:
    """A C file as a library, or None where there is no compiler or the environment says no."""
    wanted = os.environ.get("DIFFQ_FX_KERNELS", "native")
    if wanted not in ("native", "torch"):
        raise ValueError(f'DIFFQ_FX_KERNELS must be "native" or "torch", got {wanted!r}.')
    compiler = next((path for name in (os.environ.get("CC", "cc"), "gcc", "clang") if (path := shutil.which(name))), None)
    if wanted == "torch" or compiler is None or os.name != "posix":
        return None
    try:
        return ctypes.CDLL(str(_build(compiler, source, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("%s is done without, since %s could not build the kernel: %s", source.name, compiler, error)
        return None


def _build(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    """The library for this source, compiler and processor: that of an earlier run, or a new one."""
    key = hashlib.sha256(b"\0".join([source.read_bytes(), " ".join([compiler, *flags]).encode(), _processor().encode()])).hexdigest()[:16]
    library = _cache_folder() / f"{source.stem}-{key}.so"
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    except OSError:  # a home that cannot be written to
        library = Path(tempfile.mkdtemp(prefix="diffq_fx-")) / library.name
        handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        subprocess.run([compiler, *flags, str(source), "-o", name], check=True, capture_output=True, timeout=120)
        os.replace(name, library)  # whole or not at all, also when several processes build it
    finally:
        Path(name).unlink(missing_ok=True)
    return library


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffq_fx"


def _processor() -> str:
    """What the instructions of ``-march=native`` depend on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}))
