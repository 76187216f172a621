"""Rounding that lets the weights of a row that are still to be rounded make up for those that are (GPTQ, arXiv:2210.17323).

Rounding changes the output of a layer by ``e H e^T`` for each row, ``e = q - w`` and H the second moments of the inputs. Columns are
rounded one after another; the error of column j is spread over the later columns so that this sum is least (OBS, Hassibi & Stork, 1993):
``w[k] -= (w[j] - q[j]) U[j, k] / U[j, j]``, with U the upper triangular factor of ``H^-1 = U^T U``.

Shape legend: O rows (output channels), I columns, G parts of the rows that have inputs of their own, R = O / G, B columns of a block.
"""

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.budget.coded_levels import CodedLevels
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import GroupLayout, rows_of

_BLOCK = 128
"""Columns whose errors are gathered before they go to all later columns, in one matrix product."""
_PIECE = 1 << 22
"""Weights that are worked on at a time: rows do not depend on each other."""
_DAMPING = 0.01
"""Of the mean of the diagonal, added to all of it: GPTQ's own choice."""
_FURTHER = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""What to try where less leaves no Cholesky factor: moments in float32 have negative eigenvalues of that order."""


def compensate(
    rows_OI: Tensor,
    moments: Tensor,
    params: QuantParams,
    bits: Tensor,
    layout: GroupLayout,
    *,
    damping: float = _DAMPING,
    falling: bool = True,
    code: CodedLevels | None = None,
    kept_OI: Tensor | None = None,
) -> Tensor:
    """Round a weight onto its grid so that the output of its layer changes little.

    Rows whose output would change less by rounding each weight to the nearest level are rounded so.

    Args:
        rows_OI: the weight's rows, shape (O, I).
        moments: second moments of what the columns are multiplied with, shape (I, I) or (G, I, I) with G a divisor of O; or their diagonal,
            shape (G, I), with which nothing can be made up for: the nearest levels.
        params: the grid.
        bits: the width of each group, whole, from 1 to 16; broadcasts to the scale.
        layout: that of the scale.
        damping: part of the mean of the diagonal that is added to it; above 0.
        falling: whether columns are rounded in the order of falling moments, not from the first to the last.
        code: what levels cost beside their error, where that counts (CERWU, arXiv:2505.18758).
        kept_OI: which weights take their nearest level whatever the others' errors are, bool: the ends of ranges that follow the weights.

    Returns:
        Weights of the grid, shape (O, I), in the scale's type: exactly those that :func:`diffq_fx.functional.dequantize` gives, which
        rounding gives back bit by bit.

    Raises:
        ValueError: moments of another shape, or not finite.

    Example:
        >>> rows, moments = torch.tensor([[0.4, 0.4]]), torch.ones(2, 2)  # both columns always have the same input
        >>> layout = GroupLayout.of(1, 2, "channel")
        >>> grid = QuantParams(torch.tensor([[1.0]]), torch.tensor([[1]]), None)
        >>> compensate(rows, moments, grid, torch.tensor([[2]]), layout)
        tensor([[0., 1.]])
    """
    moments = moments[None] if moments.ndim == 2 and moments.shape[0] == moments.shape[1] == layout.columns else moments
    _check(rows_OI, moments, layout)
    rows_OI = rows_OI.detach().to(params.scale.dtype)
    nearest_OI = _nearest(rows_OI, params, bits, layout)
    if moments.ndim == 2:
        return nearest_OI
    order_I = moments.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True, stable=True) if falling else None
    ordered = moments if order_I is None else moments[:, order_I][:, :, order_I]
    spread_GII, worth_GI = _spread(ordered.float(), damping)
    rounded_OI = torch.empty_like(rows_OI)
    groups = len(moments)
    height = layout.rows if groups > 1 else max(_PIECE // max(layout.columns, 1), 1)
    for top in range(0, layout.rows, height):
        part = slice(top, min(top + height, layout.rows))
        grid = _Columns(params.of_rows(part), rows_of(bits, part), layout.of_rows(part), order_I, worth_GI, code)
        fixed_OI = None if kept_OI is None else torch.where(kept_OI[part], nearest_OI[part], torch.nan)
        rounded_OI[part] = _rounded(rows_OI[part], spread_GII, grid, fixed_OI)
        if code is not None:
            continue
        better = output_error(rounded_OI[part] - rows_OI[part], moments) <= output_error(nearest_OI[part] - rows_OI[part], moments)
        rounded_OI[part] = torch.where(better[:, None], rounded_OI[part], nearest_OI[part])
    return rounded_OI


def shrunk(moments_GII: Tensor, count: float) -> Tensor:
    """Second moments of few inputs, nearer to those of all: what columns have in common is multiplied with ``1 - rho``.

    Few inputs correlate by chance, and rounding would make up for errors along directions that other inputs do not have. rho is the square
    of that of oracle approximating shrinkage (Chen et al., 2010, arXiv:0907.4698) of the correlations C towards none, for N inputs of I
    columns: ``((1 - 2/I) tr C^2 + I^2) / ((N + 1 - 2/I) (tr C^2 - I))``, at most 1.

    Differs from the paper: the square. Of many inputs a few per cent would go, and with them what makes up for errors (docs/accuracy.md).

    Args:
        moments_GII: means over the inputs, shape (G, I, I).
        count: N, how many inputs they are means of.

    Example:
        >>> white = torch.eye(2)[None] + 0.1
        >>> shrunk(white, 4)[0, 0, 1].item(), round(shrunk(white, 1e6)[0, 0, 1].item(), 3)
        (0.0, 0.1)
    """
    diagonal = moments_GII.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    size = (diagonal > 0).sum(-1)
    square = torch.einsum("gi,gij,gj->g", inverse, moments_GII.square(), inverse)
    part = 1 - 2 / size.clamp(min=1)
    rho = (part * square + size**2) / ((count + part) * (square - size)).clamp(min=1e-12)  # 0 where all are zero, 1 where none is known
    kept = moments_GII * (1 - rho.clamp(0, 1).square())[:, None, None]
    kept.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return kept


def output_error(errors_OI: Tensor, moments: Tensor) -> Tensor:
    """Mean squared change of the output of each row, ``e H e^T``, for the errors of its weights; shape (O,).

    Args:
        errors_OI: rounded weights less the weights.
        moments: shape (G, I, I), or (G, I) for the diagonal alone.

    Example:
        >>> output_error(torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, 2))
        tensor([0.])
    """
    errors_GRI = errors_OI.reshape(len(moments), -1, errors_OI.shape[1])
    changed = errors_GRI * moments[:, None] if moments.ndim == 2 else errors_GRI @ moments.to(errors_OI.dtype)
    return (changed * errors_GRI).sum(-1).reshape(-1)


def _check(rows_OI: Tensor, moments: Tensor, layout: GroupLayout) -> None:
    columns, groups = layout.columns, moments.shape[0]
    if tuple(rows_OI.shape) != (layout.rows, columns) or moments.shape[1:] not in ((columns,), (columns, columns)) or layout.rows % groups:
        raise ValueError(
            f"compensate: expected rows of shape {(layout.rows, columns)} and moments of shape (G, {columns}, {columns}) with G a divisor "
            f"of {layout.rows}, got {tuple(rows_OI.shape)} and {tuple(moments.shape)}."
        )
    if not bool(torch.isfinite(moments).all()):
        raise ValueError("compensate: the moments are not finite everywhere.")


def _nearest(rows_OI: Tensor, params: QuantParams, bits: Tensor, layout: GroupLayout) -> Tensor:
    return functional.dequantize(functional.quantize(rows_OI, params, bits, layout), params, layout)


def _spread(moments_GII: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``U`` of ``H^-1 = U^T U``, each row divided by its diagonal: how the error of a column goes to the later ones, shape (G, I, I).

    With what is left of the squared error of each column then, ``1 / U_jj^2``, over its mean, shape (G, I).

    With the order of columns turned round, ``H = L L^T``; turned back, ``H = R R^T`` with R upper triangular, and ``U = R^-1``.
    Columns that nothing is multiplied with have errors of their own alone.
    """
    tries = [(torch.float32, damping), (torch.float64, damping), *((torch.float64, further) for further in _FURTHER if further > damping)]
    for dtype, damping in tries:
        turned = moments_GII.to(dtype).flip(-1, -2)
        diagonal = turned.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        diagonal += torch.where(diagonal > 0, damping * mean, torch.where(mean > 0, mean, 1))
        factor, failed = torch.linalg.cholesky_ex(turned)
        if bool(failed.any()):
            continue
        unit = torch.eye(turned.shape[-1], dtype=dtype, device=turned.device).expand_as(turned)
        inverse = torch.linalg.solve_triangular(factor, unit, upper=False).flip(-1, -2)
        own = inverse.diagonal(dim1=-2, dim2=-1)
        spread, worth = inverse / own[..., None], own.square().reciprocal()
        if bool(torch.isfinite(spread).all()):
            return spread.float(), (worth / worth.mean(-1, keepdim=True)).float()
    raise ValueError("compensate: the moments are no second moments: they have negative eigenvalues. Gather them anew.")


class _Columns:
    """The grid of one column at a time, in the order of rounding."""

    def __init__(
        self, params: QuantParams, bits: Tensor, layout: GroupLayout, order_I: Tensor | None, worth_GI: Tensor, code: CodedLevels | None
    ) -> None:
        self.params, self.layout = params, layout
        self.bits = bits.expand_as(params.scale)
        self.order_I, self.worth_GI, self.code = order_I, worth_GI, code
        self.order = range(layout.columns) if order_I is None else order_I.tolist()
        self.column = GroupLayout(layout.rows, 1, "channel", 1)

    def round(self, values_GR: Tensor, index: int) -> Tensor:
        """The levels for values of the column that is rounded as number ``index``: the nearest ones, or those with the least cost."""
        group = 0 if self.params.scale.shape[1] == 1 else self.order[index] // self.layout.block
        own = self.params.map(lambda values: values[:, group : group + 1])
        bits, values_O1 = self.bits[:, group : group + 1], values_GR.reshape(-1, 1)
        if self.code is None:
            return _nearest(values_O1, own, bits, self.column).view_as(values_GR)
        worth_O1 = self.worth_GI[:, index, None].expand_as(values_GR).reshape(-1, 1)
        return self.code.choose(values_O1, own, bits, self.column, worth_O1).view_as(values_GR)


def _rounded(rows_OI: Tensor, spread_GII: Tensor, grid: _Columns, fixed_OI: Tensor | None) -> Tensor:
    """The rows on their levels; those that are fixed where ``fixed_OI`` is not NaN."""
    groups, columns = len(spread_GII), rows_OI.shape[1]

    def by_columns(values_OI: Tensor) -> Tensor:
        ordered_OI = values_OI if grid.order_I is None else values_OI[:, grid.order_I]
        return ordered_OI.reshape(groups, -1, columns).mT.contiguous()  # a column lies in one row

    rest_GIR, fixed_GIR = by_columns(rows_OI), None if fixed_OI is None else by_columns(fixed_OI)
    rounded_GIR = torch.empty_like(rest_GIR)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        block_GBR, errors_GBR = rest_GIR[:, first:last], torch.empty_like(rest_GIR[:, first:last])
        for index in range(first, last):
            own_GR = rest_GIR[:, index]
            rounded_GR = grid.round(own_GR, index)
            if fixed_GIR is not None:
                rounded_GR = torch.where(fixed_GIR[:, index].isnan(), rounded_GR, fixed_GIR[:, index])
            rounded_GIR[:, index] = rounded_GR
            error_GR = errors_GBR[:, index - first] = own_GR - rounded_GR
            block_GBR[:, index - first + 1 :] -= spread_GII[:, index, index + 1 : last, None] * error_GR[:, None]
        rest_GIR[:, last:] -= spread_GII[:, first:last, last:].mT @ errors_GBR
    rounded_OI = rounded_GIR.mT.reshape(rows_OI.shape)
    return rounded_OI if grid.order_I is None else torch.empty_like(rounded_OI).index_copy_(1, grid.order_I, rounded_OI)
