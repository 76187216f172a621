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
    height, width = _largest_tile(weight_GS)
    units_HS, short = weight.new_empty(height, width, dtype=compute), 1 < width <= _SHORT
    step_HS, ones_1S = torch.empty_like(units_HS) if short else units_HS, units_HS.new_ones(1, width)
    for tile in _tiles(weight_GS):
        noise = _noise_of(tile, seed, weight_GS)
        units, in_steps = _in_units(noise, gaussian, _part(units_HS, noise))
        step_tile = step_G1[tile[0]]
        if short:
            step_tile = torch.mm(step_tile, ones_1S, out=_part(step_HS, noise))
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
    sums_G1 = torch.zeros(len(grad_GS), 1, dtype=compute, device=grad.device)
    buffer_HS = grad.new_empty(_largest_tile(grad_GS), dtype=compute)
    ones_S1 = buffer_HS.new_ones(buffer_HS.shape[1], 1)
    for tile in _tiles(grad_GS):
        noise = _noise_of(tile, seed, grad_GS)
        units, in_steps = _in_units(noise, gaussian, _part(buffer_HS, noise))
        product = units.mul_(grad_GS[tile])
        if grad_GS.shape[1] == 1:
            torch.mul(product, in_steps, out=sums_G1[tile[0]])
        else:
            sums_G1[tile[0]].addmm_(product, ones_S1[: product.shape[1]], alpha=in_steps)  # faster than a sum over a short last axis
    return sums_G1.view(step.shape).to(step.dtype)


def _noise_of(tile: tuple[slice, slice], seed: Tensor, weight_GS: Tensor) -> Tensor:
    """The noise bytes of a tile of (G, S): they follow each other, since a tile is of whole groups or of one."""
    groups, size = weight_GS.shape
    height, width = (min(part.stop, end) - part.start for part, end in zip(tile, (groups, size), strict=True))
    return noise_bytes(seed, tile[0].start * size + tile[1].start, height * width).view(height, width)


def _all_in_units(seed: Tensor, rows_OI: Tensor, gaussian: bool) -> tuple[Tensor, float]:
    noise_OI = noise_bytes(seed, 0, rows_OI.numel()).view(rows_OI.shape)
    return _in_units(noise_OI, gaussian, torch.empty_like(rows_OI, memory_format=torch.contiguous_format))


def _in_units(noise: Tensor, gaussian: bool, into: Tensor) -> tuple[Tensor, float]:
    """Noise bytes as noise in some unit, written to ``into``, and that unit in steps: a pass over memory less than noise in steps."""
    if gaussian:
        index = noise.to(torch.int32).add_(127).bitwise_right_shift_(1)
        return into.copy_(gaussian_table(noise.device)[index]), 1.0
    return into.copy_(noise), 1 / 256


def _as_groups(tensor: Tensor, layout: GroupLayout, axis: int) -> Tensor | None:
    """A view of shape (G, S), one row a group, or None where strides or a short last block do not allow it."""
    if axis != 0 or not tensor.is_contiguous() or layout.columns % layout.block:
        return None
    return tensor.view(layout.num_groups, -1)


def _largest_tile(tensor_GS: Tensor) -> tuple[int, int]:
    """Groups and weights in each of the largest tile."""
    groups, size = tensor_GS.shape
    if tensor_GS.device.type != "cpu":
        return groups, size
    return (min(groups, TILE // size), size) if size <= TILE else (1, TILE)


def _part(buffer_HS: Tensor, tile: Tensor) -> Tensor:
    """As much as this tile takes of the memory that all are worked on in, one after the other: fresh memory costs more than the work."""
    return buffer_HS[: tile.shape[0], : tile.shape[1]]


def _tiles(tensor_GS: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (G, S) into tiles of about :data:`~diffq_fx.functional.groups.TILE` elements: whole groups, or pieces of one group."""
    height, width = _largest_tile(tensor_GS)
    for top in range(0, tensor_GS.shape[0], max(height, 1)):
        yield from ((slice(top, top + height), slice(left, left + width)) for left in range(0, tensor_GS.shape[1], max(width, 1)))
