"""The noise in torch's own operations, for every device, dtype and stride.

On a CPU weights are worked on in tiles that stay in the cache, so that main memory sees each weight read once and written once.
Elsewhere one tile is everything.

Shape legend: G groups, S weights in each (a tile's view), O rows, I columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffq_fx.functional.groups import TILE, GroupLayout, from_rows, to_rows
from diffq_fx.kernels import memory
from diffq_fx.kernels.draws import gaussian_table, noise_bytes

_SHORT = 64
"""Weights in a group up to which a step for each weight is written out: to broadcast over so short an axis takes longer."""


def add(weight: Tensor, step: Tensor, seed: Tensor, layout: GroupLayout, axis: int, gaussian: bool) -> Tensor:
    """Noisy weight, contiguous."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    weight_GS = _as_groups(weight, layout, axis)
    if weight_GS is None:
        rows_OI = to_rows(weight, axis).to(compute)
        units, in_steps = _all_in_units(seed, rows_OI, gaussian)
        noisy = torch.addcmul(rows_OI, units, layout.expand(step).to(compute), value=in_steps)
        return from_rows(noisy.to(weight.dtype), tuple(weight.shape), axis).contiguous()
    out = memory.empty(weight.shape, weight.dtype, weight.device)
    out_GS, step_G1 = out.view(weight_GS.shape), step.reshape(-1, 1).to(compute)
    short = 1 < weight_GS.shape[1] <= _SHORT
    step_HS, ones_1S = None, step_G1.new_ones(1, weight_GS.shape[1]) if short else step_G1
    for tile, units, in_steps in _noise_in_tiles(weight_GS, seed, gaussian):
        step_tile = step_G1[tile[0]]
        if short:
            step_HS = torch.empty_like(units) if step_HS is None else step_HS
            step_tile = torch.mm(step_tile, ones_1S, out=step_HS[: len(units)])
        if weight.dtype == compute:
            torch.addcmul(weight_GS[tile], units, step_tile, value=in_steps, out=out_GS[tile])
        else:
            out_GS[tile] = torch.addcmul(weight_GS[tile].to(compute), units, step_tile, value=in_steps)
    return out


def reduce(grad: Tensor, seed: Tensor, step: Tensor, layout: GroupLayout, axis: int, gaussian: bool) -> Tensor:
    """Sum over each group of ``grad * noise``, like ``step``."""
    compute = torch.promote_types(grad.dtype, torch.float32)
    grad_GS = _as_groups(grad, layout, axis)
    if grad_GS is None:
        rows_OI = to_rows(grad, axis).to(compute)
        units, in_steps = _all_in_units(seed, rows_OI, gaussian)
        return layout.sum(units.mul_(rows_OI)).mul_(in_steps).to(step.dtype)
    sums_G1, ones_S1 = (
        torch.full((length, 1), value, dtype=compute, device=grad.device) for length, value in zip(grad_GS.shape, (0, 1), strict=True)
    )
    for tile, units, in_steps in _noise_in_tiles(grad_GS, seed, gaussian):
        product = units.mul_(grad_GS[tile])
        if grad_GS.shape[1] == 1:
            torch.mul(product, in_steps, out=sums_G1[tile[0]])
        else:
            sums_G1[tile[0]].addmm_(product, ones_S1[: product.shape[1]], alpha=in_steps)  # faster than a sum over a short last axis
    return sums_G1.view(step.shape).to(step.dtype)


def _as_groups(tensor: Tensor, layout: GroupLayout, axis: int) -> Tensor | None:
    """A view of shape (G, S), one row a group, or None where strides or a short last block do not allow it."""
    if axis != 0 or not tensor.is_contiguous() or layout.columns % layout.block:
        return None
    return tensor.view(layout.num_groups, -1)


def _noise_in_tiles(tensor_GS: Tensor, seed: Tensor, gaussian: bool) -> Iterator[tuple[tuple[slice, slice], Tensor, float]]:
    """Tiles of about :data:`TILE` elements, whole groups or pieces of one, and the noise of each as :func:`_in_units` has it.

    The noise of all tiles lies in the same memory, one after the other: fresh memory costs more than the work.
    """
    groups, size = height, width = tensor_GS.shape
    if tensor_GS.device.type == "cpu":
        height, width = (min(groups, TILE // size), size) if size <= TILE else (1, TILE)
    buffer_HS = tensor_GS.new_empty(height, width, dtype=torch.promote_types(tensor_GS.dtype, torch.float32))
    for top in range(0, groups, height):
        for left in range(0, size, width):
            tile = slice(top, min(top + height, groups)), slice(left, min(left + width, size))
            rows, columns = tile[0].stop - top, tile[1].stop - left
            noise = noise_bytes(seed, top * size + left, rows * columns).view(rows, columns)
            yield tile, *_in_units(noise, gaussian, buffer_HS[:rows, :columns])


def _all_in_units(seed: Tensor, rows_OI: Tensor, gaussian: bool) -> tuple[Tensor, float]:
    noise_OI = noise_bytes(seed, 0, rows_OI.numel()).view(rows_OI.shape)
    return _in_units(noise_OI, gaussian, torch.empty_like(rows_OI, memory_format=torch.contiguous_format))


def _in_units(noise: Tensor, gaussian: bool, into: Tensor) -> tuple[Tensor, float]:
    """Noise bytes as noise in some unit, written to ``into``, and that unit in steps: a pass over memory less than noise in steps."""
    if gaussian:
        index = noise.to(torch.int32).add_(127).bitwise_right_shift_(1)
        return into.copy_(gaussian_table(noise.device)[index]), 1.0
    return into.copy_(noise), 1 / 256
