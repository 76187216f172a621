"""The kinds of processors that a file can be exported for: what onnxruntime's kernels cost there, as data.

A profile is a small table of :class:`~diffq_fx.export.onnx.layout.cost.Cost`, one line a kernel, that ``benchmarks/product_costs.py``
measures and fits (least squares on relative errors); only *ratios* of its times are used. What the tables say:

- a fused product wins where the weights do not fit the cache (1 row of 2048 x 2048), on every kind;
- with AVX-512 VNNI it also wins from about 512 inputs on at any number of rows, with AVX2 alone it loses there;
- it loses on small layers: every row is quantized anew, and the cost per output is that of 100 weights;
- long blocks are faster: 32 weights per scale (onnxruntime's choice for a per-channel scale) costs up to twice 256;
- a product with rounded activations is the fastest nearly everywhere from about 256 x 256 on. Weights of uint8, which levels beyond +-64
  need to be right without VNNI, cost about 1.3 times int8 on AVX2 and up to six times with VNNI.
"""

from collections.abc import Mapping

from diffq_fx.export.onnx.layout.cost import Cost, Profile

X86_AVX2 = Profile(
    name="x86-avx2",
    source="medians of 70 shapes (K and N 32 to 4096, 1 to 256 rows) by benchmarks/product_costs.py, one thread, AMD "
    "EPYC, x86-avx2 (a processor with AVX-512, onnxruntime restricted to AVX2); half of the predictions within 2%",
    margin=1.18,
    costs={
        "float": Cost(5.01, 0.0297, 0.0424, 0.00146, 0, 17.8, 0, 0),
        "fused 2": Cost(5.75, 0, 0.00115, 0.557, 2.08, 15.8, 0.14, 163),
        "fused 4": Cost(5.64, 0.00925, 0.00395, 0.434, 0.946, 14, 0.249, 99.3),
        "fused 8": Cost(5.64, 0.00493, 0.00256, 0.393, 0.961, 23.1, 0.0769, 158),
        "dynamic int8": Cost(5.82, 0.00465, 0.00299, 0.32, 0.13, 9.2, 2.95, 4.49e-13),
        "dynamic uint8": Cost(5.79, 0.00853, 0.00366, 0.34, 0.143, 12.3, 2.71, 1.05e-08),
    },
)
"""x86-64 with AVX2 and no VNNI: Intel before 2019, AMD before Zen 4."""

X86_VNNI_INTEL = Profile(
    name="x86-vnni (Intel)",
    source="medians of 225 shapes (K and N 8 to 2048, 1 to 1024 rows, blocks of 16 to 256), and of 216 for dynamic products, in "
    "onnxruntime 1.31, one thread of a Xeon with AVX-512 VNNI; half of the predictions within 15 %; uint8 weights by their kernel's ratio",
    margin=1.11,
    costs={
        "float": Cost(5.83, 0.0484, 0.111, 0.0108, 0.279, 10.5),
        "fused 2": Cost(6.33, 0.0, 0.011, 0.449, 4.66, 0.168, 0.792, 827.0),
        "fused 4": Cost(6.53, 0.0, 0.0181, 0.383, 2.25, 6.84, 0.373, 119.0),
        "fused 8": Cost(6.32, 0.00936, 0.0331, 0.353, 1.71, 6.15, 0.475, 111.0),
        "dynamic int8": Cost(7.45, 0.0038, 0.03, 0.26, 0.324, 1.12, 5.21),
        "dynamic uint8": Cost(7.45, 0.0038, 0.03, 0.26, 0.324, 7.0, 5.21),
    },
)
"""An Intel processor with AVX-512 VNNI. At its margin 498 of the measured layers were fused, 4 of them more than 3 % slower than float
(18 % at most), and 163 dynamic, 5 of them more than 3 % slower (12 % at most)."""

X86_VNNI_AMD = Profile(
    name="x86-vnni (AMD)",
    source="medians of 70 shapes (K and N 32 to 4096, 1 to 256 rows) by benchmarks/product_costs.py, one thread, AMD "
    "EPYC, x86-vnni; half of the predictions within 3%",
    margin=1.05,
    costs={
        "float": Cost(4.97, 0.0171, 0.0454, 0, 0, 18.5, 0, 0),
        "fused 2": Cost(5.87, 0, 0.00305, 0.445, 3.13, 2.73, 0.124, 667),
        "fused 4": Cost(5.69, 0.000366, 0.00262, 0.288, 1.11, 7.7, 0.126, 203),
        "fused 8": Cost(5.59, 0.00481, 0.00198, 0.245, 1.04, 7.47, 0.0273, 164),
        "dynamic int8": Cost(5.91, 0.00436, 0.00854, 0.17, 0.109, 4.73, 2.97, 0),
        "dynamic uint8": Cost(5.84, 0.00519, 0.00929, 0.19, 0.129, 11.9, 2.78, 0),
    },
)
"""An AMD processor with AVX-512 VNNI (Zen 4 and later)."""

ARM64 = Profile(
    name="arm64",
    source="not measured: read from onnxruntime's sources (MLAS) and the throughput of the instructions that its kernels use",
    margin=1.3,
    costs={
        "float": Cost(5.83, 0.0484, 0.111, 0.0108, 0.279, 48.0),
        "fused 4": Cost(6.53, 0.03, 0.0181, 0.45, 2.25, 25.0, 0.373, 119.0),
        "fused 8": Cost(6.32, 0.02, 0.0331, 0.45, 2.25, 25.0, 0.475, 119.0),
        "dynamic int8": Cost(7.45, 0.0038, 0.03, 0.35, 0.324, 14.0, 5.21),
        "dynamic uint8": Cost(7.45, 0.0038, 0.03, 0.35, 0.324, 14.0, 5.21),
    },
)
"""Arm64 with dot products (Armv8.2 and later). Not measured; from onnxruntime's own sources, ``onnxruntime/core/mlas/lib``:

- ``platform.cpp`` takes ``MlasGemmU8X8DispatchUdot`` for products of uint8 activations where UDOT is there: one kernel for int8 and
  uint8 weights (the sign is flipped when they are packed), which adds into int32 and cannot saturate. UDOT makes 16 products, FMLA 4.
- ``qnbitgemm_kernel_neon.cpp`` has int8 kernels for MatMulNBits of 4 and 8 bits where there are dot products. Its 2-bit kernel is newer
  than the oldest onnxruntime that reads our files; without it weights are unpacked at every run, so that 2 bits are computed as 8.

The costs a product are a core that starts two such instructions a cycle at 2.6 GHz; memory, calls and outputs are those of x86. The margin
is wide because nothing of it was measured."""

KINDS: Mapping[str, tuple[Profile, ...]] = {
    "portable": (X86_AVX2, X86_VNNI_INTEL, X86_VNNI_AMD),
    "x86-avx2": (X86_AVX2,),
    "x86-vnni": (X86_VNNI_INTEL, X86_VNNI_AMD),
    "arm64": (ARM64,),
}
"""What ``export_onnx(target=...)`` may be -> the profiles on all of which a form must beat float."""

THIS_MACHINE = "this-machine"
"""The target whose times are measured while the file is written."""

TARGETS = (*KINDS, THIS_MACHINE)
