"""Quantizers of weight matrices: HQQ, torchao, onnxruntime's MatMulNBits and llama.cpp's types (package gguf).

Each rounds the matrices by its own functions and the values are put back into the float model: what its runtime computes from the same
levels, without the rounding of activations that some runtimes add. Scales and float zero points are float16, as they are shipped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.frontier.job import Job, Point
from benchmarks.frontier.post_training.matrices import (
    Rounded,
    Setting,
    by_name,
    measured,
    mib_of,
    nearest,
    replace_matrices,
    score,
    size_of,
)

Quantize = Callable[[Tensor, Setting], Rounded]
_HALF = 16
_FLOAT_ZERO = [Setting(4, 128, 2 * _HALF), Setting(3, 64, 2 * _HALF), Setting(2, 64, 2 * _HALF)]
_WHOLE_ZERO = [Setting(4, 64, _HALF + 4), Setting(3, 32, _HALF + 3), Setting(2, 32, _HALF + 2)]
_SYMMETRIC = [Setting(4, 64, _HALF), Setting(3, 32, _HALF), Setting(2, 32, _HALF)]


def _padded(rows: Tensor, group: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % group))


def _blocks(rows: Tensor, setting: Setting) -> np.ndarray:
    return _padded(rows, setting.group).reshape(-1, setting.group).numpy()


def _unblocked(blocks: np.ndarray, rows: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(blocks, np.float32)).view(len(rows), -1)[:, : rows.shape[1]]


def _half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


def _hqq(rows: Tensor, setting: Setting) -> Rounded:
    """HQQ: a float zero point found by half-quadratic splitting. Its blocks run on from row to row; else a row is one."""
    from hqq.core.quantize import Quantizer

    group = setting.group if rows.numel() % setting.group == 0 else None
    quantized, found = Quantizer.quantize(
        rows.contiguous(), nbits=setting.bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float16, bitpack=False
    )
    values = (quantized.reshape(found["scale"].shape[0], -1).float() - found["zero"].half().float()) * found["scale"].half().float()
    return values.view_as(rows), rows.numel() * setting.bits + found["scale"].numel() * setting.overhead


def _torchao(rows: Tensor, setting: Setting, *, algorithm: str, mapping: str) -> Rounded:
    """torchao's IntxWeightOnlyConfig on a Linear."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    divides = rows.shape[1] % setting.group == 0
    linear = torch.nn.Linear(rows.shape[1], len(rows), bias=False)
    linear.weight = torch.nn.Parameter(rows.clone())
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{setting.bits}"),
        granularity=PerGroup(setting.group) if divides else PerAxis(0),
        mapping_type=MappingType[mapping],
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[algorithm],
    )
    quantize_(linear, config)
    blocks = rows.numel() // setting.group if divides else len(rows)
    return linear.weight.dequantize().float(), rows.numel() * setting.bits + blocks * setting.overhead  # pyright: ignore


def _ort_default(rows: Tensor, setting: Setting) -> Rounded:
    """MatMulNBitsQuantizer's default: onnxruntime's own kernel, round to nearest. It packs; its levels are unpacked."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config: Any = DefaultWeightOnlyQuantConfig(block_size=setting.group, is_symmetric=False, bits=setting.bits)
    packed, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(rows.T.contiguous().numpy())
    levels = _unpacked(packed.reshape(-1, packed.shape[-1]), setting.bits)
    zeros = _unpacked(zero_points.reshape(len(rows), -1), setting.bits)[:, : scales.size // len(rows)]
    values = (levels.astype(np.float32) - zeros.reshape(-1, 1)) * _half(scales.reshape(-1, 1))
    return _unblocked(values, rows), size_of(rows, setting)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Levels of bytes, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(len(packed), -1)


def _ort_hqq(rows: Tensor, setting: Setting) -> Rounded:
    """MatMulNBitsQuantizer's HQQ."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=setting.group, bits=setting.bits))
    levels, scales, zeros = quantizer.quantize_internal(rows, bits=setting.bits, group_size=setting.group)
    values = (levels.view(-1, setting.group) - zeros.half().float().view(-1, 1)) * scales.half().float().view(-1, 1)
    return values.view(len(rows), -1)[:, : rows.shape[1]], size_of(rows, setting)


def _ort_k_quant(rows: Tensor, setting: Setting) -> Rounded:
    """MatMulNBitsQuantizer's k_quant: llama.cpp's search for scale and minimum, the minimum rounded to a zero point."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    levels, scales, zeros = quant_tensor_k_quant_cpu(_blocks(rows, setting), setting.bits, setting.group)
    return _unblocked((levels - zeros) * _half(scales), rows), size_of(rows, setting)


def _gguf(rows: Tensor, setting: Setting) -> Rounded:
    """A type of llama.cpp; rows that its blocks do not divide stay float16, as there."""
    import gguf

    if rows.shape[1] % setting.group:
        return rows.half().float(), _HALF * rows.numel()
    kind = {4.5: gguf.GGMLQuantizationType.Q4_0, 5: gguf.GGMLQuantizationType.Q4_1, 8.5: gguf.GGMLQuantizationType.Q8_0}
    packed = gguf.quants.quantize(rows.contiguous().numpy(), kind[setting.bits_a_weight])
    return torch.from_numpy(gguf.quants.dequantize(packed, kind[setting.bits_a_weight])), packed.nbytes * 8


def _run(quantize: Quantize, settings: Sequence[Setting], *, embedding: bool) -> Callable[[Job], Point]:
    def run(job: Job) -> Point:
        setting, model = nearest(settings, job.bits), job.copy_of_float()
        with measured() as costs:
            bits = replace_matrices(model, lambda _, rows: quantize(rows.detach(), setting), embedding=embedding)
        return score(job, model, mib_of(model, bits), str(setting), costs)

    return run


def _torchao_rtn(rows: Tensor, setting: Setting) -> Rounded:
    return _torchao(rows, setting, algorithm="AFFINE", mapping="ASYMMETRIC")


def _torchao_hqq(rows: Tensor, setting: Setting) -> Rounded:
    return _torchao(rows, setting, algorithm="HQQ_SCALE_ONLY", mapping="SYMMETRIC")


_ORT = ("onnxruntime",)
_ALL: dict[str, tuple[Quantize, list[Setting], tuple[str, ...], str]] = {
    "hqq": (_hqq, _FLOAT_ZERO, ("hqq",), "HQQ"),
    "torchao-rtn": (_torchao_rtn, _WHOLE_ZERO, ("torchao",), "torchao IntxWeightOnlyConfig, round to nearest, asymmetric"),
    "torchao-hqq": (_torchao_hqq, _SYMMETRIC, ("torchao",), "torchao IntxWeightOnlyConfig, HQQ_SCALE_ONLY, symmetric"),
    "ort-rtn": (_ort_default, [_WHOLE_ZERO[0], Setting(2, 16, _HALF + 2), _WHOLE_ZERO[2]], _ORT, "onnxruntime MatMulNBits, default"),
    "ort-hqq": (_ort_hqq, [_FLOAT_ZERO[0], Setting(2, 32, 2 * _HALF), _FLOAT_ZERO[2]], _ORT, "onnxruntime MatMulNBits, HQQ"),
    "ort-k-quant": (_ort_k_quant, _WHOLE_ZERO, _ORT, "onnxruntime MatMulNBits, k_quant (its kernels have no 3 bits; its function has)"),
    "llama.cpp": (
        _gguf,
        [Setting(4, 32, _HALF), Setting(8, 32, _HALF)],
        ("gguf",),
        "Q4_0 by package gguf, which cannot write Q2_K to Q6_K",
    ),
}
QUANTIZERS = {
    name + ("" if embedding else "-e8"): by_name(_run(quantize, settings, embedding=embedding), packages, summary, embedding=embedding)
    for name, (quantize, settings, packages, summary) in _ALL.items()
    for embedding in (True, False)
}
