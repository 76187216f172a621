"""What a packed file takes: what an entropy coder saves of levels and scales, and what all that is not quantized takes in it."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import GroupLayout, rows_of
from diffq_fx.functional.precision import widened, widest_float
from diffq_fx.weights import WeightSpec

SMALL_BYTES = 1 << 16
"""Tensors that are not quantized and have fewer bytes lie together in a packed file, coded."""

_HEADER_BITS, _ENTRY_BITS = 8 * 800, 28
"""What a file says of itself, and about what the name and shape of each tensor adds: both are deflated."""
_ITEM = 4
"""Bytes of a number: those at the same place in all numbers have one model, since the highest are much alike."""
_TABLE_BITS = 4
_STREAM_BITS, _LEVEL_BITS, _MOST_LEVELS = 8 * 12, 16, 16
"""What a file has beside the levels of one width: for their stream, and in its table for each of at most so many levels."""


@torch.no_grad()
def coded_bits(tensors: Sequence[Tensor]) -> int:
    """Bits of numbers of four bytes in order-0 entropy code, ``sum_k min(n H_k + t u_k, 8 n)`` over the places k of a byte.

    The code needs a table of the u different bytes, of t = 4 bits each.

    Example:
        >>> coded_bits([torch.linspace(1, 2, 1000)]), coded_bits([torch.ones(1000)])
        (23538, 16)
    """
    pieces = [tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu() for tensor in tensors]
    data = torch.cat([torch.zeros(0, dtype=torch.uint8), *pieces])
    counts = torch.stack([torch.bincount(data[place::_ITEM], minlength=256).double() for place in range(_ITEM)])
    coded = torch.stack([_code_length(each) for each in counts]) + _TABLE_BITS * (counts > 0).sum(1)
    return round(float(torch.minimum(coded, 8 * counts.sum(1)).sum()))


@torch.no_grad()
def rest_in_file(tensors: Sequence[Tensor]) -> int:
    """Bits of what is not quantized in a packed file: small tensors coded, large ones as they are, and the file's header."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    small = [tensor for tensor, size in zip(tensors, sizes, strict=True) if size < SMALL_BYTES]
    return coded_bits(small) + 8 * sum(size for size in sizes if size >= SMALL_BYTES) + _HEADER_BITS + _ENTRY_BITS * len(sizes)


class RoundedWeight(NamedTuple):
    """A weight and the grid that it would be rounded on."""

    spec: WeightSpec
    rows: Tensor
    """Shape (O, I)."""
    width: Tensor
    """Whole widths, shape of the spec's ``bits_layout``."""
    params: QuantParams


@torch.no_grad()
def bits_saved(weights: Iterable[RoundedWeight]) -> int:
    """Bits that order-0 entropy coding takes off bit packing: of levels ``sum_q n_b(q) (b + log2 (n_b(q) / n_b))``.

    Each weight has one model for each width b, of levels relative to their zero point; each width has a table of 12 bytes and 2 for each
    level up to 16. All scales have one model for each byte, and all widths have one, about as :func:`~diffq_fx.export.packed.save_packed`
    codes them. Below 0 where the widths take more than is saved elsewhere.
    """
    saved, levels, scales, widths = 0.0, 0.0, [], []
    for each in weights:
        levels += _levels_saved(each)
        saved += _ends_saved(each.spec, each.width)
        scales += _of_ranges(each)
        widths.append(each.width.reshape(-1))
    tables = sum(_STREAM_BITS + _LEVEL_BITS * min(2**width, _MOST_LEVELS) for width in torch.cat(widths).unique().tolist())
    saved += _widths_saved(widths) + max(levels - tables, 0)
    return round(saved) + 8 * sum(scale.numel() * scale.element_size() for scale in scales) - coded_bits(scales)


def _widths_saved(widths: Sequence[Tensor]) -> float:
    """Of the widths, of which bit packing has as many bits for each as tell those of its weight apart."""
    packed = sum(width.numel() * int(width.max() - width.min()).bit_length() for width in widths)
    return packed - float(_code_length(widened(torch.bincount(torch.cat(list(widths)).long()))))


def _of_ranges(weight: RoundedWeight) -> list[Tensor]:
    """What a file holds of each range: its extent, of which the scales of all widths follow, and its offset where the grid has one."""
    rows, columns = weight.spec.range_layout.shape
    extent = weight.params.scale * (torch.exp2(weight.width) - 1)
    return [each[:rows, :columns].float() for each in (extent, weight.params.offset) if each is not None]


def _ends_saved(spec: WeightSpec, width: Tensor) -> int:
    """Bits of the second ends of ranges with several widths: in a file such a range has a zero point for each width that occurs in it."""
    ranges = spec.range_layout.num_groups
    if spec.grid not in functional.AROUND_ZERO or spec.bits_layout.num_groups <= ranges:
        return 0
    width_RG = width.reshape(ranges, -1).long()
    occurs = torch.zeros(ranges, int(width_RG.max()) + 1, dtype=torch.int64, device=width.device).scatter_(1, width_RG, 1)
    zero_point_bits = torch.arange(occurs.shape[1], device=width.device) + int(spec.grid == "half")
    return 32 * ranges - int((occurs * zero_point_bits).sum())


def _code_length(counts: Tensor) -> Tensor:
    """Bits of the order-0 entropy code of values that occur so often, one model for each row, 0-d."""
    return -torch.special.xlogy(counts, counts / counts.sum(-1, keepdim=True).clamp(min=1)).sum() / math.log(2)


def symbols(levels: Tensor, params: QuantParams, width: Tensor, layout: GroupLayout, largest: int) -> Tensor:
    """What is coded of levels: ``2^largest b + (q - zero_point) mod 2^b``, int64, for widths b up to ``largest``."""
    width = layout.expand(width.to(torch.int32).expand(params.scale.shape)).expand(levels.shape)
    if params.zero_point is not None:
        levels = (levels - layout.expand(params.zero_point.int())) & ((1 << width) - 1)
    return ((width << largest) + levels).long()


def level_counts(weight: RoundedWeight) -> Tensor:
    """How often each level occurs, a row for each width and a column for each level relative to the zero point."""
    _, rows_OI, width, params = weight
    layout, largest = weight.spec.scale_layout, int(width.max())
    counts = torch.zeros((largest + 1) << largest, dtype=widest_float(rows_OI.device), device=rows_OI.device)
    for part in layout.row_slices(rows_OI.device):
        own, own_width = layout.of_rows(part), rows_of(width, part)
        of_rows = params.of_rows(part)
        levels_PI = functional.quantize(rows_OI[part].to(params.scale.dtype), of_rows, own_width, own)
        counts += torch.bincount(symbols(levels_PI, of_rows, own_width, own, largest).reshape(-1), minlength=len(counts))
    return counts.view(largest + 1, -1)


def _levels_saved(weight: RoundedWeight) -> float:
    counts = level_counts(weight)
    packed = (counts.sum(1) * torch.arange(len(counts), device=counts.device)).sum()
    return float((packed - _code_length(counts)).clamp(min=0))
