"""Calls of the kernels in Triton, for contiguous weights on GPUs; without Triton torch's own operations do the same."""

import functools
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels.draws import gaussian_table, span_table
from diffq_fx.kernels.settings import NoiseSettings

DEVICES = ("cuda",)
"""What torch calls the devices for which Triton compiles: NVIDIA's and AMD's."""
_TILE = 2048
"""Weights that a program works on at a time."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def kernels() -> ModuleType | None:
    """The kernels, or None where there is no Triton: torch has it with it wherever it has a GPU, but on Windows."""
    try:
        return importlib.import_module("diffq_fx.kernels.triton_kernels")
    except ImportError:
        return None


def takes(weight: Tensor, layout: GroupLayout, axis: int) -> bool:
    """Whether the kernels can work on this weight, or its gradient, here: no short last groups."""
    fits = weight.device.type in DEVICES and weight.dtype in _DTYPES and axis == 0 and weight.is_contiguous() and weight.numel() > 0
    return fits and layout.columns % layout.block == 0 and kernels() is not None


def add(weight: Tensor, step: Tensor, seed: Tensor, layout: GroupLayout, gaussian: bool) -> Tensor:
    """Noisy weight."""
    out, step = torch.empty_like(weight), step.contiguous()
    stride = 0 if layout.kind == "tensor" else step.shape[1]
    settings = {"LOGITS": False, "CLIPS": False, "GRID": "float", "GAUSSIAN": gaussian}
    table, empty = _table(gaussian, weight), out  # what is not asked for points at something
    launch("add_noise", layout, weight, step, empty, seed, table, out, empty, *_shape(layout), stride, 0.0, 0.0, 0.0, **settings)
    return out


def reduce(grad: Tensor, seed: Tensor, step: Tensor, layout: GroupLayout, gaussian: bool) -> Tensor:
    """Sum over each group of ``grad * noise``, like ``step``."""
    sums = grad.new_empty((layout.rows, layout.columns // layout.block), dtype=torch.float32)
    table, settings = _table(gaussian, grad), {"LOGITS": False, "GAUSSIAN": gaussian}
    launch("reduce_noise", layout, grad, sums, sums, seed, table, sums, *_shape(layout), 0.0, 0.0, 0.0, **settings)
    return (sums.sum() if layout.kind == "tensor" else sums).reshape(step.shape).to(step.dtype)


def noisy(weight: Tensor, logits: Tensor, seed: Tensor, settings: NoiseSettings) -> tuple[Tensor, Tensor]:
    """Noisy weight, and the length of each range and how fast it grows with the bits, one behind the other."""
    out, layout = torch.empty_like(weight), _by_range(settings.groups, settings.ranges.kind == "channel")
    span = logits.new_empty(2, *settings.ranges.shape)
    how = {"LOGITS": True, "CLIPS": settings.clips, "GRID": settings.grid, "GAUSSIAN": settings.gaussian}
    table, spans = _table(settings.gaussian, weight), span_table(weight.device)
    count, block = _shape(layout)
    launch("add_noise", layout, weight, logits, spans, seed, table, out, span, count, block, count, *settings.bits, **how)
    return out, span


def noisy_backward(grad: Tensor, logits: Tensor, span: Tensor, seed: Tensor, settings: NoiseSettings) -> Tensor:
    """Gradient of the logits, the noise made again from its seed."""
    grad, grad_logits, layout = grad.contiguous(), torch.empty_like(logits), _by_range(settings.groups, settings.ranges.kind == "channel")
    table, how = _table(settings.gaussian, grad), {"LOGITS": True, "GAUSSIAN": settings.gaussian}
    launch("reduce_noise", layout, grad, logits, span, seed, table, grad_logits, *_shape(layout), *settings.bits, **how)
    return grad_logits


def takes_ranges(weight: Tensor, width: Tensor, groups: GroupLayout, ranges: GroupLayout, grid: str, axis: int) -> bool:
    """Whether the kernels can round this weight within kept ranges: of rows, or of the groups that have a width each."""
    fits = grid != "float" and (ranges.kind == "channel" or (ranges.kind == "block" and width.shape == ranges.shape))
    return fits and takes(weight, groups, axis)


def round_in_range(
    weight: Tensor, low: Tensor, high: Tensor, factor: Tensor | None, width: Tensor, groups: GroupLayout, grid: str
) -> Tensor:
    """The nearest weight on the grid of its range, kept ends times ``factor``; see :class:`~diffq_fx.kernels.RoundInRange`."""
    out, layout = torch.empty_like(weight), _by_range(groups, low.shape[1] == 1)
    how = {"GRID": grid, "LEARNED": factor is not None}
    learned = low if factor is None else factor
    launch("round_in_range", layout, weight, low, high, learned, width, out, *_shape(layout), *_strides(width, layout), **how)
    return out


def slope_of_clip(
    grad: Tensor, weight: Tensor, factor: Tensor, kept: Sequence[Tensor], groups: GroupLayout, grid: str, reach: float, gain: float
) -> Tensor:
    """The gradient of ``clip``, shape of ``factor``; what is kept are low and high ends and widths."""
    low, high, width = kept
    slope, layout = torch.empty_like(factor), _by_range(groups, factor.shape[1] == 1)
    tensors, places = (grad.contiguous(), weight, low, high, factor, width, slope), (*_shape(layout), *_strides(width, layout))
    launch("slope_of_clip", layout, *tensors, *places, reach, gain, GRID=grid)
    return slope


def tile_of(layout: GroupLayout) -> dict[str, int]:
    """How much of a row a program works on at a time, and by how many warps: the constants of ``triton_kernels.py``."""
    count, block = _shape(layout)
    each = math.gcd(block, 8)
    slots = max(min(_power_of_two(block), _TILE), each)
    groups = min(_power_of_two(count), _TILE // slots)
    return {"GROUPS": groups, "SLOTS": slots, "EACH": each, "num_warps": min(max(groups * slots // 256, 1), 4)}


def launch(name: str, layout: GroupLayout, *arguments: Any, **constants: Any) -> None:
    """Start a kernel, one program for each row."""
    getattr(kernels(), name)[(layout.rows,)](*arguments, **constants, **tile_of(layout))


def _by_range(groups: GroupLayout, of_rows: bool) -> GroupLayout:
    """The layout with a row for each range, of a row or of a group: the noise of a weight depends on its place alone."""
    return groups if of_rows else GroupLayout.of(groups.num_groups, groups.block, "channel")


def _strides(width: Tensor, layout: GroupLayout) -> tuple[int, int]:
    """From the width of a group to that in the next row, and in the next group of the row; none where one stands for all."""
    rows, groups = (width.numel(), 1) if width.shape[0] != layout.rows and width.numel() > 1 else width.shape
    return groups if rows > 1 else 0, int(groups > 1)


def _shape(layout: GroupLayout) -> tuple[int, int]:
    """Groups in a row, and weights in each."""
    return layout.columns // layout.block, layout.block


def _table(gaussian: bool, like: Tensor) -> Tensor:
    return gaussian_table(like.device) if gaussian else like


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
