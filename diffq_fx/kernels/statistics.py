"""What a range is made of, for each group of a weight: one pass over memory for all of it."""

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import native


def statistics(rows_OI: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smallest and largest weight, sum and sum of squares of each group, in float32 or better; without autograd.

    Args:
        rows_OI: weight rows, shape (O, I).
        layout: the groups.

    Returns:
        Four tensors of shape (R, C); NaN in all of them where a weight of the group is NaN.

    Example:
        >>> [each.item() for each in statistics(torch.tensor([[1.0, -2.0, 2.0]]), GroupLayout.of(1, 3, "tensor"))]
        [-2.0, 2.0, 1.0, 9.0]
    """
    rows_OI = rows_OI.detach()
    if native.takes_rows(rows_OI):
        low, high, total, square = native.statistics(rows_OI, layout)
    else:
        by_row = _by_row(layout)
        parts = [_statistics_of(rows_OI[part], by_row.of_rows(part)) for part in layout.row_slices(rows_OI.device)]
        low, high, total, square = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
    if layout.kind != "tensor":
        return low, high, total, square
    return low.amin().view(1, 1), high.amax().view(1, 1), total.sum().view(1, 1), square.sum().view(1, 1)


def extremes(rows_OI: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, shape (R, C), in the weight's dtype; without autograd.

    Example:
        >>> extremes(torch.tensor([[1.0, -2.0, 3.0]]), GroupLayout.of(1, 3, "channel"))
        (tensor([[-2.]]), tensor([[3.]]))
    """
    rows_OI = rows_OI.detach()
    return statistics(rows_OI, layout)[:2] if native.takes_rows(rows_OI) else layout.aminmax(rows_OI)


def _by_row(layout: GroupLayout) -> GroupLayout:
    """The layout, or that of each row alone for one of a whole tensor: its results are put together at the end."""
    return GroupLayout.of(layout.rows, layout.columns, "channel") if layout.kind == "tensor" else layout


def _statistics_of(rows_OI: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_OI = rows_OI.to(torch.promote_types(rows_OI.dtype, torch.float32))
    square = torch.linalg.vector_norm(layout.blocks(rows_OI), dim=-1).square_()  # no pass to write the squares
    return *layout.aminmax(rows_OI), layout.sum(rows_OI), square
