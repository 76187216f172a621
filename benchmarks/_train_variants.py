"""The kernels in C, each in the variants that this processor can run."""

import statistics
from types import SimpleNamespace
from unittest import mock

import torch

from benchmarks._result import markdown_table
from benchmarks._train_systems import Step, interleaved, ratio
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import extension, native

MILLIONS = 8 * 1024 * 1024 / 1e6


def part_variants(quick: bool) -> str:
    """Each kernel in C in each variant that this processor can run, over the fastest variant."""
    torch.manual_seed(0)
    variants = {name: SimpleNamespace(**functions) for name, functions in extension.variants().items()}
    rows = []
    for group in ("channel", 8):
        for name, call in _calls(GroupLayout.of(2048, 4096, group)).items():
            seconds = interleaved({key: _with(kernels, call) for key, kernels in variants.items()}, 5 if quick else 25, warm_up=3)
            first = next(iter(seconds.values()))
            cells = [f"{1e3 * statistics.median(t) / MILLIONS:.3f}, {ratio(t, first)}" for t in seconds.values()]
            rows.append([name, group, *cells])
    header = ("8.4 M weights", "groups", *(f"{name}: ms per million weights, over {next(iter(variants))}" for name in variants))
    return markdown_table(header, rows)


def _calls(layout: GroupLayout) -> dict[str, Step]:
    weight, grad = (torch.randn(layout.rows, layout.columns) for _ in range(2))
    scale, seed = torch.rand(layout.shape) / 8 + 0.01, torch.tensor([7])
    zero_point, top = torch.full_like(scale, 7.0), torch.full_like(scale, 15.0)
    grids = (torch.stack([scale, scale * 1.1, scale * 1.2]), torch.stack([zero_point] * 3), top)
    logits, values = torch.randn(layout.num_groups), torch.ones(layout.num_groups)
    bits = (2.0, 8.0, 3.0)
    return {
        "noise": lambda: native.add(weight, scale, seed, layout, False),
        "noise, backward": lambda: native.reduce(grad, seed, scale, layout, False),
        "Gaussian noise": lambda: native.add(weight, scale, seed, layout, True),
        "rounding": lambda: native.round_to_grid(weight, scale, zero_point, top, layout),
        "statistics": lambda: native.statistics(weight, layout),
        "errors on 3 grids": lambda: native.rounding_errors(weight, None, *grids, layout),
        "slope of ranges": lambda: native.range_slope(grad, weight, weight, scale, layout, 0.5),
        "size of the bits": lambda: native.size(values, logits, *bits),
        "slope of the size": lambda: native.slope_of_size(values, logits, 1.0, *bits),
    }


def _with(kernels: SimpleNamespace, call: Step) -> Step:
    def step() -> None:
        with mock.patch.object(extension, "kernels", return_value=kernels):
            call()

    return step
