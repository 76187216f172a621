"""Pseudo quantization noise as one operator: draw, add, and in the backward one grouped reduction.

``w + step * n`` with n independent of w, DiffQ (arXiv:2104.09987). One byte of randomness per weight is drawn and kept for the backward.
The seed of each draw comes from torch's default CPU generator, so ``torch.manual_seed`` repeats a run and activation
checkpointing recomputes the same noise; the rank is mixed in, so that ranks that were seeded alike still draw different noise.

The limit is memory bandwidth: weights are worked on in tiles that stay in the processor's cache, so that main memory sees each
weight read once and written once.

Differs from the paper: the range is a constant of the step, so the gradient of the weight is the identity.

Shape legend: G groups, S weights in each (a tile's view), O rows, I columns.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffq_fx.groups import GroupLayout, from_rows, to_rows
from diffq_fx.storage import scale_layout_of

GAUSSIAN_STD = 0.5
"""The paper's Gaussian noise is ``(step / 2) N(0, 1)``; uniform noise, ``(step / 2) U[-1, 1]``, has std 1/sqrt(12)."""

_SEED_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, from the golden ratio: consecutive ranks land far apart
_ODD = 0x0101010101010101  # or-ed into each byte: odd bytes are symmetric about zero
_TILE = 1 << 17
"""Weights in a tile: large enough for the cost of a call not to show, small enough for its noise to stay in the cache."""


def draw_bytes(numel: int, device: torch.device) -> Tensor:
    """Draw ``numel`` independent random int8, uniform over the odd numbers from -127 to 127.

    128 values centred on zero: as noise, ``byte / 256``, mean 0 and variance 1/12 to within 6e-6.
    """
    seed = int(torch.randint(2**62, (1,)))
    distributed = torch.distributed
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    generator = torch.Generator(device).manual_seed((seed + rank * _SEED_MULTIPLIER) % 2**63)
    words = torch.empty(-(-numel // 8), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.bitwise_or_(_ODD).view(torch.int8)[:numel]


@functools.cache
def _gaussian_table(device: torch.device) -> Tensor:
    """Noise of each odd byte, in steps: 128 quantiles of the normal distribution, brought to exactly :data:`GAUSSIAN_STD`."""
    middle = (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    quantiles = torch.special.ndtri(middle)
    quantiles *= GAUSSIAN_STD / quantiles.square().mean().sqrt()
    return quantiles.float().to(device)


def _in_steps(noise: Tensor, gaussian: bool, dtype: torch.dtype) -> Tensor:
    """Noise bytes as noise in steps."""
    if gaussian:
        index = noise.to(torch.int32).add_(127).bitwise_right_shift_(1)
        return _gaussian_table(noise.device)[index].to(dtype)
    return noise.to(dtype).mul_(1 / 256)


def _layout(shape: torch.Size, step: Tensor, axis: int, block: int) -> GroupLayout:
    rows = shape[axis]
    return scale_layout_of(step, rows, math.prod(shape) // rows, block)


def _as_groups(tensor: Tensor, layout: GroupLayout, axis: int) -> Tensor | None:
    """A view of shape (G, S), one row a group, or None where strides or a short last block do not allow it."""
    if axis != 0 or not tensor.is_contiguous() or layout.columns % layout.block:
        return None
    return tensor.view(layout.num_groups, -1)


def _tiles(groups: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut (G, S) into tiles of about :data:`_TILE` elements: whole groups, or pieces of one group."""
    if size <= _TILE:
        height = max(1, _TILE // size)
        yield from ((slice(top, top + height), slice(None)) for top in range(0, groups, height))
    else:
        for group in range(groups):
            yield from ((slice(group, group + 1), slice(left, left + _TILE)) for left in range(0, size, _TILE))


@torch.library.custom_op("diffq_fx::add_noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def add_noise_op(weight: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Noisy weight, contiguous, and the bytes that were drawn, in the order of the weight's rows."""
    noise = draw_bytes(weight.numel(), weight.device)
    layout = _layout(weight.shape, step, axis, block)
    compute = torch.promote_types(weight.dtype, torch.float32)
    weight_GS = _as_groups(weight, layout, axis)
    if weight_GS is None:
        rows_OI = to_rows(weight, axis).to(compute)
        in_steps = _in_steps(noise, gaussian, compute).view(rows_OI.shape)
        noisy = torch.addcmul(rows_OI, in_steps, layout.expand(step).to(compute))
        return from_rows(noisy.to(weight.dtype), tuple(weight.shape), axis).contiguous(), noise
    out = torch.empty_like(weight)
    out_GS, noise_GS, step_G1 = out.view_as(weight_GS), noise.view_as(weight_GS), step.reshape(-1, 1).to(compute)
    for tile in _tiles(*weight_GS.shape):
        in_steps = _in_steps(noise_GS[tile], gaussian, compute)
        if weight.dtype == compute:
            torch.addcmul(weight_GS[tile], in_steps, step_G1[tile[0]], out=out_GS[tile])
        else:
            out_GS[tile] = in_steps.mul_(step_G1[tile[0]]).add_(weight_GS[tile])
    return out, noise


@add_noise_op.register_fake
def _(weight, step, axis, block, gaussian):  # noqa: ANN001, ANN202
    noise = weight.new_empty(weight.numel(), dtype=torch.int8)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), noise


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    _, step, ctx.axis, ctx.block, ctx.gaussian = inputs
    ctx.save_for_backward(output[1], step)


def _backward(ctx, grad: Tensor, _: Tensor):  # noqa: ANN001, ANN202
    noise, step = ctx.saved_tensors
    grad_step = None
    if ctx.needs_input_grad[1]:
        grad_step = torch.ops.diffq_fx.reduce_noise(grad, noise, step, ctx.axis, ctx.block, ctx.gaussian)
    return grad, grad_step, None, None, None


@torch.library.custom_op("diffq_fx::reduce_noise", mutates_args=())
def reduce_noise_op(grad: Tensor, noise: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
    """Gradient of the step: the sum over each group of ``grad * noise``."""
    layout = _layout(grad.shape, step, axis, block)
    compute = torch.promote_types(grad.dtype, torch.float32)
    grad_GS = _as_groups(grad, layout, axis)
    if grad_GS is None:
        rows_OI = to_rows(grad, axis).to(compute)
        return layout.sum(_in_steps(noise, gaussian, compute).view(rows_OI.shape).mul_(rows_OI)).to(step.dtype)
    noise_GS = noise.view_as(grad_GS)
    sums_G1 = torch.zeros(len(grad_GS), 1, dtype=compute, device=grad.device)
    ones_S1 = torch.ones(min(grad_GS.shape[1], _TILE), 1, dtype=compute, device=grad.device)
    for tile in _tiles(*grad_GS.shape):
        product = _in_steps(noise_GS[tile], gaussian, compute).mul_(grad_GS[tile])
        if grad_GS.shape[1] == 1:
            sums_G1[tile[0]] = product
        else:
            sums_G1[tile[0]].addmm_(product, ones_S1[: product.shape[1]])  # faster than a sum over a short last axis
    return sums_G1.view(step.shape).to(step.dtype)


@reduce_noise_op.register_fake
def _(grad, noise, step, axis, block, gaussian):  # noqa: ANN001, ANN202
    return torch.empty_like(step)


torch.library.register_autograd("diffq_fx::add_noise", _backward, setup_context=_setup_context)


class _StepOfLogits(torch.autograd.Function):
    """``step = span / (2^b - 1)`` with ``b = b_min + sigmoid(gain l) (b_max - b_min)``, and its derivative in closed form."""

    @staticmethod
    def forward(ctx, logits: Tensor, span: Tensor, min_bits: float, max_bits: float, gain: float) -> Tensor:  # noqa: ANN001
        share = torch.sigmoid(logits * gain)
        levels = torch.exp2(share * (max_bits - min_bits) + min_bits)
        step = span / (levels - 1)
        ctx.save_for_backward(share, levels, step)
        ctx.slope = gain * (max_bits - min_bits) * math.log(2)
        ctx.shape = logits.shape
        return step

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        share, levels, step = ctx.saved_tensors
        grad_logits = (grad * step).sum_to_size(ctx.shape) * (share - 1) * share * (levels / (levels - 1)) * ctx.slope
        return grad_logits, None, None, None, None


def step_of_logits(logits: Tensor, span: Tensor, *, min_bits: float, max_bits: float, gain: float) -> Tensor:
    """Step of each group from its trainable logit: ``span / (2^b - 1)``, ``b = b_min + sigmoid(gain l) (b_max - b_min)``.

    The same as :func:`diffq_fx.functional.bits_from_logits` and :func:`diffq_fx.functional.step_size` after each other, in fewer kernels.

    Args:
        logits: shape (R, C).
        span: high - low of each range, shape that broadcasts with ``logits``; a constant.
        min_bits: smallest width, in bits.
        max_bits: largest width, in bits.
        gain: see :class:`~diffq_fx.methods.diffq.DiffQConfig`.

    Returns:
        Steps, the shape of both together.

    Example:
        >>> step_of_logits(torch.zeros(1, 1), torch.ones(1, 1), min_bits=1, max_bits=3, gain=1)
        tensor([[0.3333]])
    """
    return _StepOfLogits.apply(logits, span, min_bits, max_bits, gain)


def add_noise(weight: Tensor, step: Tensor, *, axis: int, block: int, gaussian: bool = False) -> Tensor:
    """Add pseudo quantization noise: ``w + step * n``, DiffQ (arXiv:2104.09987).

    Args:
        weight: float, any shape.
        step: shape (R, C) of a :class:`~diffq_fx.groups.GroupLayout` of the weight; its gradient is ``sum(grad * n)`` per group.
        axis: the weight's output channel axis.
        block: the layout's block length.
        gaussian: draw N(0, 1/2) in place of U[-1/2, 1/2].

    Returns:
        The noisy weight, contiguous, of the weight's shape and dtype.

    Example:
        >>> weight = torch.zeros(4, 8)
        >>> noisy = add_noise(weight, torch.ones(4, 1), axis=0, block=8)
        >>> bool(noisy.abs().max() < 0.5)
        True
    """
    return torch.ops.diffq_fx.add_noise(weight, step, axis, block, gaussian)[0]
