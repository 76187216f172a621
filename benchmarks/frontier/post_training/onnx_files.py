"""onnxruntime's own quantizers on the float model, without training: size and score are those of the file."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.frontier.job import Job, NotApplicableError, Point, System
from benchmarks.frontier.sessions import score_file
from benchmarks.frontier.tasks import Task
from diffq_fx.demo.race import preprocessed, quantize_to_4_bits, quantize_to_int8

_CALIBRATION = 4


def _export_float(task: Task, path: Path) -> None:
    from diffq_fx.export.onnx.translation import quiet

    with quiet():
        torch.onnx.export(task.float_model.eval(), task.test_example, path, dynamo=True, external_data=False, verbose=False)


def _quantized(job: Job, quantize: Callable[[Task, Path, Path], str]) -> Point:
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        _export_float(job.task, source)
        setting = quantize(job.task, source, result)
        return {"mib": result.stat().st_size / 2**20, "setting": setting, **score_file(job.task, result)}


def _int8(job: Job) -> Point:
    return _quantized(job, _quantize_static if job.task.has_convolutions else _quantize_dynamic)


def _quantize_dynamic(task: Task, source: Path, result: Path) -> str:
    quantize_to_int8(source, result)
    return "quantize_dynamic, int8 per channel"


def _quantize_static(task: Task, source: Path, result: Path) -> str:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    names = [each.name for each in onnx.load(source).graph.input]
    batches = itertools.islice(task.calibration(), _CALIBRATION)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            inputs = next(batches, None)
            return None if inputs is None else {name: each.contiguous().numpy() for name, each in zip(names, inputs, strict=True)}

    quantize_static(
        preprocessed(source),
        result,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return f"quantize_static, int8 per channel, {_CALIBRATION} batches of {next(task.test_batches())[1].shape[0]} to calibrate"


def _int4(job: Job) -> Point:
    if job.task.has_convolutions:
        raise NotApplicableError("onnxruntime's 4-bit quantizer takes MatMul and Gather alone, and this task's weights are mostly others")
    return _quantized(job, _quantize_4_bits)


def _quantize_4_bits(task: Task, source: Path, result: Path) -> str:
    quantize_to_4_bits(source, result)
    return "MatMulNBits, 4 bits, blocks of 32, embeddings too"


ONNX_FILES: dict[str, System] = {
    "ort-int8": System(run=_int8, packages=("onnxruntime",), summary="onnxruntime post-training quantization, int8", bits=8, trains=False),
    "ort-int4": System(
        run=_int4, packages=("onnxruntime",), summary="onnxruntime post-training quantization, 4 bits", bits=4, trains=False
    ),
}
