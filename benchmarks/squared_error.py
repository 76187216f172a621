"""Squared rounding error of weights over their squares, by kind of zero point: whole, multiples of 1/2 at every width, and free offsets.

    python -m benchmarks.squared_error --data DIR

DIR holds ``resnet20_cifar10_float.safetensors``. Every row (output channel) has the range of least error that the library finds.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._result import markdown_table, write_result
from diffq_fx.functional import Grid, dequantize, quant_params, quantization, quantize
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import least_error_range, ranges

GRIDS: tuple[Grid, ...] = ("affine", "half", "float")
WIDTHS = range(1, 7)


def weights(data: Path) -> Iterator[tuple[str, list[Tensor]]]:
    """Rows of weights, by where they are from."""
    torch.manual_seed(0)
    yield "normal, 1,024 a row", [torch.randn(256, 1024)]
    yield "Laplace, 1,024 a row", [torch.distributions.Laplace(0.0, 1.0).sample((256, 1024))]
    own = load_file(data / "resnet20_cifar10_float.safetensors").values()
    yield "ResNet-20", [weight.flatten(1).float() for weight in own if weight.ndim > 1]


def error(rows_OI: Tensor, bits: int, grid: Grid) -> float:
    """Sum of the squared errors."""
    layout, width = GroupLayout.of(*rows_OI.shape, "channel"), torch.tensor([[bits]])
    params = quant_params(*least_error_range(rows_OI, layout, width, layout, grid), width, grid)
    return float((dequantize(quantize(rows_OI, params, width, layout), params, layout) - rows_OI).square().sum())


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    table = []
    with mock.patch.object(quantization, "WIDEST_HALF", 16), mock.patch.object(ranges, "WIDEST_HALF", 16):
        for name, tensors in weights(parser.parse_args().data):
            total = sum(float(rows.square().sum()) for rows in tensors)
            for bits in WIDTHS:
                whole, half, free = (sum(error(rows, bits, grid) for rows in tensors) / total for grid in GRIDS)
                table.append((name, bits, f"{whole:.4f}", f"{half:.4f}", f"{1 - half / whole:.1%}", f"{free:.4f}"))
    header = ("weights", "bits", "whole", "multiples of 1/2", "less by", "free offset")
    title, command = "Squared rounding error by kind of zero point", "python -m benchmarks.squared_error --data DIR"
    write_result("squared_error", title, markdown_table(header, table), ["torch", "diffq-fx"], command=command)


if __name__ == "__main__":
    main()
