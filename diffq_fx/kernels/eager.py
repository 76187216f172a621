"""The noise in torch's own operations, for every device, dtype and stride.

Weights are worked on in tiles that stay in the processor's cache, so that main memory sees each weight read once and written
once. On a GPU one tile is everything.

Shape legend: G groups, S weights in each (a tile's view), O rows, I columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffq_fx.functional.groups import TILE, GroupLayout, from_rows, to_rows
from diffq_fx.kernels import memory
from diffq_fx.kernels.draws import draw_seed, gaussian_table

_SHORT = 64
"""Weights in a group up to which a step for each weight is written out: to broadcast over so short an axis takes longer."""
_ODD = 0x0101010101010101  # or-ed into each byte: odd bytes are symmetric about zero


def draw_bytes(numel: int, device: torch.device) -> Tensor:
    """Draw ``numel`` independent random int8, uniform over the odd numbers from -127 to 127.

    128 values centred on zero: as noise, ``byte / 256``, mean 0 and variance 1/12 to within 6e-6.
    """
    generator = torch.Generator(device).manual_seed(draw_seed())
    words = memory.empty((-(-numel // 8),), torch.int64, device)
    words.random_(-(2**63), None, generator=generator)
    return words.bitwise_or_(_ODD).view(torch.int8)[:numel]


def add(weight: Tensor, step: Tensor, layout: GroupLayout, axis: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Noisy weight, contiguous, and the bytes that were drawn, in the order of the weight's rows."""
    noise = draw_bytes(weight.numel(), weight.device)
    compute = torch.promote_types(weight.dtype, torch.float32)
    weight_GS = _as_groups(weight, layout, axis)
    if weight_GS is None:
        rows_OI = to_rows(weight, axis).to(compute)
        units, in_steps = _in_units(noise, gaussian, noise.new_empty(noise.shape, dtype=compute))
        noisy = torch.addcmul(rows_OI, units.view(rows_OI.shape), layout.expand(step).to(compute), value=in_steps)
        return from_rows(noisy.to(weight.dtype), tuple(weight.shape), axis).contiguous(), noise
    out = memory.empty(weight.shape, weight.dtype, weight.device)
    out_GS, noise_GS, step_G1 = out.view(weight_GS.shape), noise.view(weight_GS.shape), step.reshape(-1, 1).to(compute)
    height, width = _largest_tile(weight_GS)
    units_HS, short = weight.new_empty(height, width, dtype=compute), 1 < width <= _SHORT
    step_HS, ones_1S = torch.empty_like(units_HS) if short else units_HS, units_HS.new_ones(1, width)
    for tile in _tiles(weight_GS):
        noise_tile, step_tile = noise_GS[tile], step_G1[tile[0]]
        units, in_steps = _in_units(noise_tile, gaussian, _part(units_HS, noise_tile))
        if short:
            step_tile = torch.mm(step_tile, ones_1S, out=_part(step_HS, noise_tile))
        if weight.dtype == compute:
            torch.addcmul(weight_GS[tile], units, step_tile, value=in_steps, out=out_GS[tile])
        else:
            out_GS[tile] = torch.addcmul(weight_GS[tile].to(compute), units, step_tile, value=in_steps)
    return out, noise


def reduce(grad: Tensor, noise: Tensor, step: Tensor, layout: GroupLayout, axis: int, gaussian: bool) -> Tensor:
    """Sum over each group of ``grad * noise``, like ``step``."""
    compute = torch.promote_types(grad.dtype, torch.float32)
    grad_GS = _as_groups(grad, layout, axis)
    if grad_GS is None:
        rows_OI = to_rows(grad, axis).to(compute)
        units, in_steps = _in_units(noise, gaussian, noise.new_empty(noise.shape, dtype=compute))
        return layout.sum(units.view(rows_OI.shape).mul_(rows_OI)).mul_(in_steps).to(step.dtype)
    noise_GS = noise.view(grad_GS.shape)
    sums_G1 = torch.zeros(len(grad_GS), 1, dtype=compute, device=grad.device)
    buffer_HS = grad.new_empty(_largest_tile(grad_GS), dtype=compute)
    ones_S1 = buffer_HS.new_ones(buffer_HS.shape[1], 1)
    for tile in _tiles(grad_GS):
        noise_tile = noise_GS[tile]
        units, in_steps = _in_units(noise_tile, gaussian, _part(buffer_HS, noise_tile))
        product = units.mul_(grad_GS[tile])
        if grad_GS.shape[1] == 1:
            torch.mul(product, in_steps, out=sums_G1[tile[0]])
        else:
            sums_G1[tile[0]].addmm_(product, ones_S1[: product.shape[1]], alpha=in_steps)  # faster than a sum over a short last axis
    return sums_G1.view(step.shape).to(step.dtype)


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
