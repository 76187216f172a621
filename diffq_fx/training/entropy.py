"""What an entropy coder saves: the bits that levels are stored in, less the length of their code."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.functional.groups import to_rows

if TYPE_CHECKING:
    from diffq_fx.methods.diffq_weight import DiffQWeight


@torch.no_grad()
def bits_saved(quantizers: Sequence["DiffQWeight"], widths: Sequence[Tensor]) -> int:
    """Bits that order-0 entropy coding of the levels takes off bit packing, ``sum_q n_b(q) (b + log2 (n_b(q) / n_b))``.

    Each weight has one model for each width b, of levels relative to their zero point, as
    :func:`~diffq_fx.export.packed.save_packed` codes them.

    Args:
        quantizers: of the weights, which are rounded as they are now.
        widths: whole widths, for each quantizer the shape of its ``bits_layout``.

    Returns:
        Bits, 0 or more.
    """
    return round(sum(_saved(quantizer, width.view(quantizer.width.shape)) for quantizer, width in zip(quantizers, widths, strict=True)))


def _saved(quantizer: "DiffQWeight", width: Tensor) -> float:
    spec = quantizer.spec
    rows_OI, layout = to_rows(quantizer.source[0].detach(), spec.axis), spec.scale_layout
    params = quantizer.params(rows_OI, width)
    largest = int(width.max())
    counts = torch.zeros((largest + 1) << largest, dtype=torch.float64, device=rows_OI.device)
    for part in layout.row_slices():
        own, own_width = layout.of_rows(part), width if width.shape[0] == 1 else width[part]
        of_rows = params.of_rows(part)
        levels_PI = functional.quantize(rows_OI[part].to(params.scale.dtype), of_rows, own_width, own)
        width_PI = own.expand(own_width.expand(of_rows.scale.shape)).expand(levels_PI.shape)
        if of_rows.zero_point is not None:
            levels_PI = (levels_PI - own.expand(of_rows.zero_point)) & ((1 << width_PI) - 1)
        index = ((width_PI << largest) + levels_PI).reshape(-1)
        counts += torch.bincount(index, minlength=len(counts))
    counts = counts.view(largest + 1, -1)
    totals = counts.sum(1, keepdim=True)
    code = -torch.special.xlogy(counts, counts / totals.clamp(min=1)).sum() / torch.log(torch.tensor(2.0))
    packed = (totals[:, 0] * torch.arange(largest + 1, device=counts.device)).sum()
    return float((packed - code).clamp(min=0))
