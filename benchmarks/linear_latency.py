"""A stack of Linear layers: our ONNX file against the float one, at several widths and numbers of rows, interleaved."""

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, convert_diffq, prepare_diffq
from diffq_fx.demo.race import export_float
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.benchmark import compare_latency

SIDE, LAYERS = 2048, 4


def main() -> None:
    """Measure and write the result file."""
    warnings.simplefilter("ignore")  # the bits are not trained: only speed is measured
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(LAYERS))).eval()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.onnx"), Path(folder, "float.onnx")
        export_float(model, torch.randn(1, SIDE), theirs)
        for bits in (4, 5):
            for rows in (1, 8, 64):
                example = torch.randn(rows, SIDE)
                converted = convert_diffq(prepare_diffq(model, example, DiffQConfig(target_bits=bits)))
                result = export_onnx(converted, example, ours)
                race = compare_latency(theirs, ours, batch=rows)
                ratio = f"{race.ratio.median:.2f} [{race.ratio.q1:.2f}, {race.ratio.q3:.2f}]"
                containers = ", ".join(str(width) for width in result.weights[0].containers)
                sizes = f"{race.size_a_mib:.2f} / {race.size_b_mib:.2f}"
                table.append((bits, containers, rows, result.weights[0].rule, ratio, sizes))
                print(table[-1], flush=True)
    header = ("target bits", "container bits", "rows", "rule", "float / ours, median [quartiles]", "MiB float / ours")
    title = f"{LAYERS} Linear layers of {SIDE} x {SIDE}"
    path = write_result("linear_latency", title, markdown_table(header, table), ["torch", "onnxruntime"])
    print(path.read_text())


if __name__ == "__main__":
    main()
