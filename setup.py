"""The kernels in C: one extension, with a variant for each kind of processor, built where a C compiler is at hand.

``DIFFQ_FX_KERNELS=torch pip install .`` leaves it out. Everything else about the package is in pyproject.toml.
"""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = "diffq_fx/kernels"
FLAGS = ["-std=gnu11", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-unknown-pragmas"]
ANY_ORDER = ["-fassociative-math", "-fno-signed-zeros"]
SAME_BITS = ["-ffp-contract=off"]  # sums in the order of the source, no fused a * b + c: the same on every processor
KERNELS = {"noise": ANY_ORDER, "bits": ANY_ORDER, "weights": SAME_BITS, "checksum": SAME_BITS}
FILES = {f"{FOLDER}/{name}": flags for name, flags in KERNELS.items()} | {"diffq_fx/export/packed/unpacking": SAME_BITS}

X86_64 = sysconfig.get_platform().endswith("x86_64")
AVX2 = ["-mavx2", "-mfma", "-mbmi2"]  # module.c asks the processor for the same
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl")), "-mprefer-vector-width=512"]
VARIANTS = {"baseline": ["-msse4.1"], "avx2": AVX2, "avx512": AVX512} if X86_64 else {"baseline": []}

ONE_FOR_ALL_PYTHONS = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which has no limited API


class BuildKernels(build_ext):
    """Compiles every file of kernels once for each variant, and the module with all of them."""

    def build_extension(self, ext: Extension) -> None:
        """All variants of all files, then the module with them."""
        openmp = self._openmp()
        for variant, for_processor in VARIANTS.items():
            for file, for_file in FILES.items():
                ext.extra_objects += self.compiler.compile(
                    [f"{file}.c"],
                    output_dir=f"{self.build_temp}/{variant}",
                    macros=[("VARIANT", variant)],
                    extra_postargs=[*FLAGS, *for_file, *for_processor, *openmp],
                )
        ext.extra_link_args += openmp
        super().build_extension(ext)

    def _openmp(self) -> list[str]:
        """The flag that makes loops parallel, where this compiler and its libraries have it; else that for vectors alone."""
        probe = Path(self.build_temp) / "openmp.c"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
        try:
            objects = self.compiler.compile([str(probe)], output_dir=self.build_temp, extra_postargs=["-fopenmp"])
            self.compiler.link_executable(objects, str(probe.with_suffix("")), extra_postargs=["-fopenmp"])
        except (CompileError, LinkError):
            return ["-fopenmp-simd"]
        return ["-fopenmp"]


def extensions() -> list[Extension]:
    """The kernels, unless the environment or the system says no: they are written for GCC and Clang."""
    if os.environ.get("DIFFQ_FX_KERNELS") == "torch" or os.name != "posix":
        return []
    macros = [("Py_LIMITED_API", "0x030A0000")] * ONE_FOR_ALL_PYTHONS + [("X86_64", "1")] * X86_64
    return [
        Extension(
            "diffq_fx.kernels._kernels",
            [f"{FOLDER}/module.c"],
            depends=[*(f"{file}.c" for file in FILES), f"{FOLDER}/inline.h", f"{FOLDER}/kernel.h"],
            define_macros=macros,
            extra_compile_args=["-std=gnu11", "-g0"],
            py_limited_api=ONE_FOR_ALL_PYTHONS,
            optional=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions() and ONE_FOR_ALL_PYTHONS else {},
)
