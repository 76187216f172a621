"""Calls of the kernels in C (noise, ranges, rounding; size of the bits), for float32 on a CPU; and where they may be called."""

import functools
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from diffq_fx import _compat
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.functional.quantization import AROUND_ZERO
from diffq_fx.kernels import extension, memory
from diffq_fx.kernels.draws import gaussian_table, span_table
from diffq_fx.kernels.memory import recorded
from diffq_fx.kernels.settings import NoiseSettings

_MANY = 64
"""Logits from which on the kernel beats torch's own operations."""
_WORTH_THREADS = 1 << 14


def takes(weight: Tensor, axis: int) -> bool:
    """Whether the kernels can work on this weight here."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and axis == 0 and weight.is_contiguous() and weight.numel() > 0
    return fits and extension.kernels() is not None


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds what it stands for: not so for subclasses such as DTensor and inside torch.func.

    Torch's own operations are always right, so they work on all else.
    """
    return type(tensor) in (Tensor, Parameter) and not _compat.in_function_transform(unknown=True)


def takes_rows(*rows_OI: Tensor, least: int = _WORTH_THREADS) -> bool:
    """Whether the kernels that are called past torch's dispatcher can work on all these rows here, and whether it pays.

    ``least`` is the number of weights from which on it does.
    """
    return not recorded() and all(is_plain(rows) and rows.numel() >= least and takes(rows, 0) for rows in rows_OI)


def takes_logits(*logits: Tensor) -> bool:
    """Whether the kernels can work on these logits, or what there is one of for each, and whether it pays."""
    return not recorded() and all(is_plain(each) and each.numel() >= _MANY and takes(each, 0) for each in logits)


def takes_size(values: Tensor, logits: Tensor) -> bool:
    """Whether the kernels can work out the size of these groups: as many values in each, or a contiguous row of their numbers."""
    return values.dtype == torch.float32 and values.stride()[0] in (0, 1) and takes_logits(logits)


def add(weight: Tensor, step: Tensor, seed: Tensor, layout: GroupLayout, gaussian: bool) -> Tensor:
    """Noisy weight."""
    out, step = memory.empty(weight.shape, weight.dtype, weight.device), step.float().contiguous()
    draw = _draw(seed, gaussian, weight.numel())
    extension.loaded().add_noise(*_at(weight, step, out), *_sizes(layout), _stride(step, layout), *draw)
    return out


def reduce(grad: Tensor, seed: Tensor, step: Tensor, layout: GroupLayout, gaussian: bool) -> Tensor:
    """Sum over each group of ``grad * noise``, the noise made again from its seed; like ``step``."""
    grad = grad.float().contiguous()
    sums = memory.empty((layout.rows, -(-layout.columns // layout.block)), torch.float32, grad.device)
    extension.loaded().reduce_noise(*_at(grad, sums), *_sizes(layout), *_draw(seed, gaussian, grad.numel()))
    return (sums.sum() if layout.kind == "tensor" else sums).reshape(step.shape).to(step.dtype)


def noisy(weight: Tensor, logits: Tensor, seed: Tensor, settings: NoiseSettings) -> tuple[Tensor, Tensor]:
    """Noisy weight; the length of each range and, behind all lengths, how it grows with the bits."""
    ranges, grid = settings.ranges, settings.grid
    out = memory.empty(weight.shape, weight.dtype, weight.device)
    span = memory.empty((2, *ranges.shape), torch.float32, weight.device)
    spans = span_table(weight.device, in_memory=True).data_ptr() if settings.clips else None
    how = ranges.kind == "block", grid in AROUND_ZERO, grid == "symmetric", *settings.bits
    draw = _draw(seed, settings.gaussian, weight.numel())
    extension.loaded().noisy(*_at(weight, logits), spans, *_at(out, span), *_sizes(settings.groups), *how, *draw)
    return out, span


def noisy_backward(grad: Tensor, logits: Tensor, span: Tensor, seed: Tensor, settings: NoiseSettings) -> Tensor:
    """Gradient of the logits, the noise made again from its seed."""
    grad, grad_logits = grad.contiguous(), memory.empty(logits.shape, logits.dtype, logits.device)
    how = settings.ranges.kind == "block", *settings.bits, *_draw(seed, settings.gaussian, grad.numel())
    extension.loaded().noisy_backward(*_at(grad, logits, span, grad_logits), *_sizes(settings.groups), *how)
    return grad_logits


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor, layout: GroupLayout) -> Tensor:
    """The nearest weight on an integer grid; scale, zero_point and top level per group of ``layout``."""
    out = memory.empty(weight.shape, weight.dtype, weight.device)
    scale, zero_point, top = (each.expand(scale.shape).float().contiguous() for each in (scale, zero_point, top))
    pointers, stride = _at(weight, scale, zero_point, top, out), _stride(scale, layout)
    extension.loaded().round(*pointers, *_sizes(layout), stride, _threads(weight.numel()))
    return out


def statistics(rows_OI: Tensor, layout: GroupLayout) -> Tensor:
    """Smallest and largest weight, sum and sum of squares of each group of a layout of channels or blocks, shape (4, R, C)."""
    results = rows_OI.new_empty(4, layout.rows, -(-layout.columns // layout.block))
    extension.loaded().statistics(*_at(rows_OI, results), *_sizes(layout), _threads(rows_OI.numel()))
    return results


def rounding_errors(
    rows_OI: Tensor, importance: Tensor | None, scale_KRC: Tensor, zero_point_KRC: Tensor, top: Tensor, layout: GroupLayout
) -> Tensor:
    """Squared rounding error of each group on each of K grids, times the importance, (1, I) or (O, I), shape (K, R, C)."""
    scale_KRC, zero_point_KRC = scale_KRC.float().contiguous(), zero_point_KRC.float().contiguous()
    top, grids = top.expand(scale_KRC.shape[1:]).float().contiguous(), len(scale_KRC)
    errors = torch.empty(grids, layout.rows, scale_KRC.shape[2], dtype=torch.float32)
    importance = None if importance is None else importance.float().contiguous()
    pointers, strides = _at(scale_KRC, zero_point_KRC, top, errors), (scale_KRC.stride(0), _stride(top, layout))
    places = *_at(rows_OI), None if importance is None else importance.data_ptr(), *pointers
    by_weight = layout.columns if importance is not None and len(importance) == layout.rows else 0
    extension.loaded().rounding_errors(*places, grids, *_sizes(layout), *strides, by_weight, _threads(rows_OI.numel()))
    return errors.sum(1, keepdim=True) if layout.kind == "tensor" else errors


def range_slope(grad_OI: Tensor, weight_OI: Tensor, rounded_OI: Tensor, scale: Tensor, layout: GroupLayout, reach: float) -> Tensor:
    """Per group the sum of ``grad * (rounded - w)``, of ``grad * rounded`` where that is more than ``reach * scale``; like ``scale``."""
    scale, sums = scale.contiguous(), grad_OI.new_empty(layout.rows, -(-layout.columns // layout.block))
    pointers, threads = _at(grad_OI, weight_OI, rounded_OI, scale, sums), _threads(grad_OI.numel())
    extension.loaded().range_slope(*pointers, *_sizes(layout), _stride(scale, layout), reach, threads)
    return sums.sum().view(1, 1) if layout.kind == "tensor" else sums


def size(values: Tensor, logits: Tensor, min_bits: float, max_bits: float, gain: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of ``values * b``, that of its derivative in each logit, the smallest and the largest logit, float64, 0-d."""
    count = logits.numel()
    parts = torch.empty(-(-count // extension.loaded().PART), 4, dtype=torch.float64)
    how = count, min_bits, max_bits - min_bits, gain, _threads(count)
    extension.loaded().size(*_at(logits, values), values.stride()[0], *_at(parts), *how)
    total, growth = parts[:, :2].sum(0).unbind()
    return total, growth, parts[:, 2].amin(), parts[:, 3].amax()


def slope_of_size(values: Tensor, logits: Tensor, times: float, min_bits: float, max_bits: float, gain: float) -> Tensor:
    """Derivative of ``times`` the size in each logit."""
    slope, count = memory.empty(logits.shape, logits.dtype, logits.device), logits.numel()
    how = count, times, max_bits - min_bits, gain, _threads(count)
    extension.loaded().slope_of_size(*_at(logits, values), values.stride()[0], *_at(slope), *how)
    return slope


def moments(grad: Tensor, slope: Tensor) -> Tensor:
    """The sums of g, n, g^2, g n and n^2 over gradient g and slope n, float64, shape (5,)."""
    parts = torch.empty(-(-grad.numel() // extension.loaded().PART), 5, dtype=torch.float64)
    extension.loaded().moments(*_at(grad, slope, parts), grad.numel(), _threads(grad.numel()))
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


def _at(*tensors: Tensor) -> Iterator[int]:
    return (tensor.data_ptr() for tensor in tensors)


def _sizes(layout: GroupLayout) -> tuple[int, int, int]:
    return layout.rows, layout.columns, layout.block


def _stride(values_RC: Tensor, layout: GroupLayout) -> int:
    """From the values of one row's groups to those of the next; none where one stands for all."""
    return 0 if layout.kind == "tensor" else values_RC.shape[1]


def _threads(elements: int) -> int:
    """As many as torch uses, where there is work for them."""
    return torch.get_num_threads() if elements >= _WORTH_THREADS else 1


def _draw(seed: Tensor, gaussian: bool, elements: int) -> tuple[int, int | None, int]:
    table = gaussian_table(torch.device("cpu"), in_memory=True).data_ptr() if gaussian else None
    return int(seed), table, _threads(elements)
