"""The kernels in C, built where a C compiler is at hand.

They are compiled once per machine, in about a second, when they are first needed; the library is kept in the user's cache
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

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("noise.c", "weights.c", "bits.c"))
_HEADER = Path(__file__).with_name("inline.h")
_FLAGS = (
    "-std=gnu11 -O3 -march=native -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -fopenmp -shared -fPIC".split()
)
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")
_log = logging.getLogger(__name__)


def loaded_library() -> ctypes.CDLL:
    """The compiled kernels, for work that was begun with them."""
    found = library()
    if found is None:
        raise RuntimeError("the noise was drawn by the C kernel, which can no longer be loaded.")
    return found


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels of training, or None where there is no compiler or the environment says no."""
    loaded = compiled(_SOURCES, _FLAGS)
    if loaded is None:
        return None
    pointer, size, word, real, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_int
    for name, arguments in {
        "add_noise": [*[pointer] * 3, *[size] * 4, word, pointer, count],
        "reduce_noise": [*[pointer] * 2, *[size] * 3, word, pointer, count],
        "noisy": [*[pointer] * 5, *[size] * 3, *[count] * 3, *[real] * 3, word, pointer, count],
        "noisy_backward": [*[pointer] * 4, *[size] * 3, count, *[real] * 3, word, pointer, count],
        "round": [*[pointer] * 5, *[size] * 4, count],
        "rounding_errors": [*[pointer] * 5, *[size] * 6, count],
        "statistics": [*[pointer] * 2, *[size] * 3, count],
        "range_slope": [*[pointer] * 5, *[size] * 4, real, count],
        "bits": [*[pointer] * 3, size, *[real] * 3, count],
        "size": [*[pointer] * 2, size, pointer, size, *[real] * 3, count],
        "slope_of_size": [*[pointer] * 2, size, pointer, size, *[real] * 3, count],
        "moments": [*[pointer] * 3, size, count],
    }.items():
        function = getattr(loaded, f"diffq_fx_{name}")
        function.argtypes, function.restype = arguments, None
    return loaded


def compiled(sources: Sequence[Path], flags: Sequence[str]) -> ctypes.CDLL | None:
    """C files as a library, or None where there is no compiler or the environment says no."""
    wanted = os.environ.get("DIFFQ_FX_KERNELS", "native")
    if wanted not in ("native", "torch"):
        raise ValueError(f'DIFFQ_FX_KERNELS must be "native" or "torch", got {wanted!r}.')
    compiler = next((path for name in (os.environ.get("CC", "cc"), "gcc", "clang") if (path := shutil.which(name))), None)
    if wanted == "torch" or compiler is None or os.name != "posix":
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, sources, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        names = ", ".join(source.name for source in sources)
        _log.info(
            "slower operations of torch and numpy do the work of %s, since %s could not build the kernels: %s", names, compiler, error
        )
        return None


def _built(compiler: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """The library for these sources, compiler and processor: that of an earlier run, or a new one."""
    contents = (source.read_bytes() for source in (*sources, _HEADER))
    key = hashlib.sha256(b"\0".join([*contents, " ".join([compiler, *flags]).encode(), _processor().encode()])).hexdigest()[:16]
    library = _cache_folder() / f"{sources[0].stem}-{key}.so"
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
        subprocess.run([compiler, *flags, *map(str, sources), "-o", name], check=True, capture_output=True, timeout=120)
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
