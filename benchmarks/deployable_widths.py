"""Digits: how much of an ONNX file its containers waste, with any width from 2 to 8 and with the widths that ONNX has."""

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, bits_report, convert_diffq, prepare_diffq
from diffq_fx.demo.digits import Task, accuracy, digits, train
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.inspection import inspect_onnx

EPOCHS, RATE = 8, 1e-3


def make_model() -> nn.Module:
    """2.7 M weights: a file of more than 1 MiB."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 1600), nn.ReLU(), nn.Linear(1600, 1600), nn.ReLU(), nn.Linear(1600, 10)
    )  # fmt: skip


def measure(widths: tuple[int, ...] | None, task: Task, example: torch.Tensor, folder: Path) -> list[tuple[object, ...]]:
    """Sizes before and after training; a row for each."""
    model = prepare_diffq(make_model(), example, DiffQConfig(target_bits=4, widths=widths))
    rows = []
    for when in ("before", "after"):
        if when == "after":
            train(model, task, EPOCHS, RATE)
        converted = convert_diffq(model)
        result = export_onnx(converted, example, folder / "model.onnx")
        packed = bits_report(converted).packed_size.total_mib
        file_mib = result.file_bytes / 2**20
        histogram = ", ".join(f"{bits}: {count}" for bits, count in sorted(bits_report(converted).histogram.items()))
        name = "any from 2 to 8" if widths is None else ", ".join(map(str, widths))
        tensors = inspect_onnx(folder / "model.onnx").tensors
        others = sum(tensor.payload_bytes for tensor in tensors if tensor.role in ("scale", "zero_point", "float"))
        content = (result.container_payload_bytes + others) / 2**20
        excess = [f"{100 * (file_mib / size - 1):+.1f} %" for size in (packed, content)]
        rows.append((name, when, f"{packed:.4f}", f"{file_mib:.4f}", *excess, histogram, f"{accuracy(converted, task):.2f}"))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the result file."""
    warnings.simplefilter("ignore")  # bits before training
    task = digits()
    example = task.test[0][:1]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for widths in (None, (2, 4, 8)) for row in measure(widths, task, example, Path(folder))]
    header = (
        "widths",
        "training",
        "bit-packed MiB",
        "ONNX file MiB",
        "file above bit-packed",
        "above levels, scales and float",
        "weights of each width",
        "accuracy %",
    )
    title = "What ONNX containers waste, with and without deployable widths"
    path = write_result("deployable_widths", title, markdown_table(header, rows), ["torch", "onnxruntime", "scikit-learn"])
    print(path.read_text())


if __name__ == "__main__":
    main()
