"""Calls of the kernels in C (noise, ranges, rounding; size of the bits), for float32 on a CPU."""

import functools
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from diffq_fx import _compat
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import extension, memory
from diffq_fx.kernels.draws import gaussian_table, span_table
from diffq_fx.kernels.memory import recorded

if TYPE_CHECKING:
    from diffq_fx.kernels.one_pass import OnePass

_MANY = 64
"""Logits from which on the kernel beats torch's own operations."""
_WORTH_THREADS = 1 << 14


def takes(weight: Tensor, axis: int) -> bool:
    """Whether the kernel can work on this weight here."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and axis == 0 and weight.is_contiguous() and weight.numel() > 0
    return fits and extension.kernels() is not None


def add(weight: Tensor, step: Tensor, seed: Tensor, layout: GroupLayout, gaussian: bool) -> Tensor:
    """Noisy weight."""
    out, step = memory.empty(weight.shape, weight.dtype, weight.device), step.float().contiguous()
    extension.loaded().add_noise(
        weight.data_ptr(),
        step.data_ptr(),
        out.data_ptr(),
        layout.rows,
        layout.columns,
        layout.block,
        0 if layout.kind == "tensor" else step.shape[1],
        *_draw(seed, gaussian, weight.numel()),
    )
    return out


def reduce(grad: Tensor, seed: Tensor, step: Tensor, layout: GroupLayout, gaussian: bool) -> Tensor:
    """Sum over each group of ``grad * noise``, the noise made again from its seed; like ``step``."""
    grad = grad.float().contiguous()
    sums = memory.empty((layout.rows, -(-layout.columns // layout.block)), torch.float32, grad.device)
    extension.loaded().reduce_noise(
        grad.data_ptr(), sums.data_ptr(), layout.rows, layout.columns, layout.block, *_draw(seed, gaussian, grad.numel())
    )
    return (sums.sum() if layout.kind == "tensor" else sums).reshape(step.shape).to(step.dtype)


def noisy(weight: Tensor, logits: Tensor, seed: Tensor, settings: "OnePass") -> tuple[Tensor, Tensor]:
    """Noisy weight; the length of each range and, behind all lengths, how it grows with the bits."""
    groups = settings.groups
    out = memory.empty(weight.shape, weight.dtype, weight.device)
    span = memory.empty((2, *settings.ranges.shape), torch.float32, weight.device)
    extension.loaded().noisy(
        weight.data_ptr(),
        logits.data_ptr(),
        span_table(weight.device).data_ptr() if settings.clips else None,
        out.data_ptr(),
        span.data_ptr(),
        groups.rows,
        groups.columns,
        groups.block,
        settings.ranges.kind == "block",
        settings.grid == "affine",
        settings.grid == "symmetric",
        settings.min_bits,
        settings.max_bits - settings.min_bits,
        settings.gain,
        *_draw(seed, settings.gaussian, weight.numel()),
    )
    return out, span


def noisy_backward(grad: Tensor, logits: Tensor, span: Tensor, seed: Tensor, settings: "OnePass") -> Tensor:
    """Gradient of the logits, the noise made again from its seed."""
    grad, groups = grad.contiguous(), settings.groups
    grad_logits = memory.empty(logits.shape, logits.dtype, logits.device)
    extension.loaded().noisy_backward(
        *(each.data_ptr() for each in (grad, logits, span, grad_logits)),
        groups.rows,
        groups.columns,
        groups.block,
        settings.ranges.kind == "block",
        settings.min_bits,
        settings.max_bits - settings.min_bits,
        settings.gain,
        *_draw(seed, settings.gaussian, grad.numel()),
    )
    return grad_logits


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor, layout: GroupLayout) -> Tensor:
    """The nearest weight on an integer grid; scale, zero_point and top level per group of ``layout``."""
    out = memory.empty(weight.shape, weight.dtype, weight.device)
    scale, zero_point, top = (each.expand(scale.shape).float().contiguous() for each in (scale, zero_point, top))
    stride = 0 if layout.kind == "tensor" else scale.shape[1]
    pointers = (each.data_ptr() for each in (weight, scale, zero_point, top, out))
    extension.loaded().round(*pointers, layout.rows, layout.columns, layout.block, stride, _threads(weight.numel()))
    return out


def takes_rows(*rows_OI: Tensor) -> bool:
    """Whether the kernels that are called past torch's dispatcher can work on all these rows here, and whether it pays."""
    return not recorded() and all(is_plain(rows) and rows.numel() >= _WORTH_THREADS and takes(rows, 0) for rows in rows_OI)


def statistics(rows_OI: Tensor, layout: GroupLayout) -> Tensor:
    """Smallest and largest weight, sum and sum of squares of each group of a layout of channels or blocks, shape (4, R, C)."""
    results = rows_OI.new_empty(4, layout.rows, -(-layout.columns // layout.block))
    pointers = (each.data_ptr() for each in (rows_OI, results))
    extension.loaded().statistics(*pointers, *rows_OI.shape, layout.block, _threads(rows_OI.numel()))
    return results


def rounding_errors(rows_OI: Tensor, scale_KRC: Tensor, zero_point_KRC: Tensor, top: Tensor, layout: GroupLayout) -> Tensor:
    """Squared rounding error of each group on each of K grids, shape (K, R, C)."""
    scale_KRC, zero_point_KRC = scale_KRC.float().contiguous(), zero_point_KRC.float().contiguous()
    grids, _, blocks = scale_KRC.shape
    top = top.expand(scale_KRC.shape[1:]).float().contiguous()
    errors = torch.empty(grids, layout.rows, blocks)
    extension.loaded().rounding_errors(
        *(each.data_ptr() for each in (rows_OI, scale_KRC, zero_point_KRC, top, errors)),
        grids,
        layout.rows,
        layout.columns,
        layout.block,
        scale_KRC.stride(0),
        0 if layout.kind == "tensor" else blocks,
        _threads(rows_OI.numel()),
    )
    return errors.sum(1, keepdim=True) if layout.kind == "tensor" else errors


def range_slope(grad_OI: Tensor, weight_OI: Tensor, rounded_OI: Tensor, scale: Tensor, layout: GroupLayout, reach: float) -> Tensor:
    """Per group the sum of ``grad * (rounded - w)``, of ``grad * rounded`` where that is more than ``reach * scale``; like ``scale``."""
    scale = scale.contiguous()
    sums = grad_OI.new_empty(layout.rows, -(-layout.columns // layout.block))
    stride = 0 if layout.kind == "tensor" else scale.shape[1]
    pointers = (each.data_ptr() for each in (grad_OI, weight_OI, rounded_OI, scale, sums))
    extension.loaded().range_slope(*pointers, layout.rows, layout.columns, layout.block, stride, reach, _threads(grad_OI.numel()))
    return sums.sum().view(1, 1) if layout.kind == "tensor" else sums


def takes_logits(logits: Tensor) -> bool:
    """Whether the kernel can work on these logits, and whether it pays."""
    fits = logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.is_contiguous() and logits.numel() >= _MANY
    return not recorded() and fits and is_plain(logits) and extension.kernels() is not None


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds what it stands for: not so for subclasses such as DTensor and inside torch.func."""
    return type(tensor) in (Tensor, Parameter) and not _compat.in_function_transform(
        unknown=True
    )  # then torch works on it, which is always right


def bits(logits: Tensor, min_bits: float, max_bits: float, gain: float) -> tuple[Tensor, Tensor]:
    """Bits of the logits and their derivative."""
    bits, slope = torch.empty_like(logits), torch.empty_like(logits)
    extension.loaded().bits(
        logits.data_ptr(), bits.data_ptr(), slope.data_ptr(), logits.numel(), min_bits, max_bits - min_bits, gain, _threads(logits.numel())
    )
    return bits, slope


def takes_size(values: Tensor, logits: Tensor) -> bool:
    """Whether the kernel can work out the size of these groups: as many values in each, or a contiguous row of their numbers."""
    return values.dtype == torch.float32 and values.stride()[0] in (0, 1) and takes_logits(logits)


def size(values: Tensor, logits: Tensor, min_bits: float, max_bits: float, gain: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of ``values * b``, that of its derivative in each logit, the smallest and the largest logit, float64, 0-d."""
    parts = torch.empty(-(-logits.numel() // extension.loaded().PART), 4, dtype=torch.float64)
    extension.loaded().size(
        logits.data_ptr(),
        values.data_ptr(),
        values.stride()[0],
        parts.data_ptr(),
        logits.numel(),
        min_bits,
        max_bits - min_bits,
        gain,
        _threads(logits.numel()),
    )
    total, growth = parts[:, :2].sum(0).unbind()
    return total, growth, parts[:, 2].amin(), parts[:, 3].amax()


def slope_of_size(values: Tensor, logits: Tensor, times: float, min_bits: float, max_bits: float, gain: float) -> Tensor:
    """Derivative of ``times`` the size in each logit."""
    slope = memory.empty(logits.shape, logits.dtype, logits.device)
    extension.loaded().slope_of_size(
        logits.data_ptr(),
        values.data_ptr(),
        values.stride()[0],
        slope.data_ptr(),
        logits.numel(),
        times,
        max_bits - min_bits,
        gain,
        _threads(logits.numel()),
    )
    return slope


def takes_moments(grad: Tensor, slope: Tensor) -> bool:
    """Whether the kernel can sum these two rows."""
    return grad.shape == slope.shape and all(takes_logits(each) for each in (grad, slope))


def moments(grad: Tensor, slope: Tensor) -> Tensor:
    """The sums of g, n, g^2, g n and n^2 over gradient g and slope n, float64, shape (5,)."""
    parts = torch.empty(-(-grad.numel() // extension.loaded().PART), 5, dtype=torch.float64)
    pointers = (each.data_ptr() for each in (grad, slope, parts))
    extension.loaded().moments(*pointers, grad.numel(), _threads(grad.numel()))
    return parts.sum(0)


def checksum(tensors: Sequence[Tensor]) -> int:
    """A number for the memory of contiguous tensors."""
    places = array("Q")
    for tensor in tensors:
        places.extend((tensor.data_ptr(), tensor.nbytes))
    places.append(0)
    extension.loaded().checksum(places.buffer_info()[0], len(tensors), _keys().data_ptr(), torch.get_num_threads())
    return places[-1]


@functools.cache
def _keys() -> Tensor:
    """Random words that the kernel of the checksum mixes with those of the memory."""
    return torch.randint(-(2**31), 2**31, (extension.loaded().KEYS,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def _threads(elements: int) -> int:
    """As many as torch uses, where there is work for them."""
    return torch.get_num_threads() if elements >= _WORTH_THREADS else 1


def _draw(seed: Tensor, gaussian: bool, elements: int) -> tuple[int, int | None, int]:
    table = gaussian_table(torch.device("cpu")).data_ptr() if gaussian else None
    return int(seed), table, _threads(elements)
