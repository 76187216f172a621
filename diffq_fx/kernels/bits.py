"""From the trainable logits of the bits to the steps of the grid, in few passes over memory."""

import math
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.groups import TILE
from diffq_fx.kernels import native


class _StepOfLogits(torch.autograd.Function):
    """``step = span / (2^b - 1)`` with ``b = b_min + sigmoid(gain l) (b_max - b_min)``, and its derivative in closed form."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, span: Tensor, unmoved: Tensor | None, min_bits: float, max_bits: float, gain: float) -> Tensor:
        ctx.bits = (min_bits, max_bits, gain)
        ctx.unmoved = None if unmoved is None else torch.zeros_like(unmoved)
        ctx.native = native.takes_steps(logits, span)
        if ctx.native:
            step = native.steps(logits, span, *ctx.bits)
            ctx.save_for_backward(logits, step)
            return step
        shape = torch.broadcast_shapes(logits.shape, span.shape)
        step = torch.empty(shape, dtype=torch.promote_types(logits.dtype, span.dtype), device=logits.device)
        for rows in _tiles(shape, logits.device):
            _, levels = _share_and_levels(_rows_of(logits, rows), *ctx.bits)
            step[rows] = _rows_of(span, rows) / levels.sub_(1)
        ctx.save_for_backward(logits, step)
        return step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, step = ctx.saved_tensors
        if ctx.native:
            return native.steps_backward(grad, logits, step, *ctx.bits), None, ctx.unmoved, None, None, None
        min_bits, max_bits, gain = ctx.bits
        slope = gain * (max_bits - min_bits) * math.log(2)
        if logits.shape != step.shape:  # logits that several ranges share, so there are few of them
            grad, step = (grad * step).sum_to_size(logits.shape), torch.ones_like(logits)
        grad_logits = torch.empty_like(logits)
        for rows in _tiles(logits.shape, logits.device):
            share, levels = _share_and_levels(logits[rows], *ctx.bits)
            # d step / d l = step * -ln 2 * levels / (levels - 1) * db/dl
            into = torch.mul(grad[rows], step[rows], out=grad_logits[rows] if grad.dtype == logits.dtype else None)
            into.mul_(levels).div_(levels.sub_(1)).mul_(share).mul_(share.sub_(1)).mul_(slope)
            grad_logits[rows] = into
        return grad_logits, None, ctx.unmoved, None, None, None


def _share_and_levels(logits: Tensor, min_bits: float, max_bits: float, gain: float) -> tuple[Tensor, Tensor]:
    """``sigmoid(gain l)`` and ``2^b``, fresh tensors."""
    share = torch.sigmoid_(logits * gain)
    return share, (share * (max_bits - min_bits)).add_(min_bits).exp2_()


def _tiles(shape: torch.Size, device: torch.device) -> list[slice]:
    """Rows of (R, C) in pieces that stay in the cache."""
    height = max(1, TILE // max(shape[1], 1)) if device.type == "cpu" else max(shape[0], 1)
    return [slice(top, top + height) for top in range(0, shape[0], height)]


def _rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """These rows, or the one row that stands for all."""
    return tensor if tensor.shape[0] == 1 else tensor[rows]


def step_of_logits(logits: Tensor, span: Tensor, *, min_bits: float, max_bits: float, gain: float, unmoved: Tensor | None = None) -> Tensor:
    """Step of each group from its trainable logit: ``span / (2^b - 1)``, ``b = b_min + sigmoid(gain l) (b_max - b_min)``.

    The same as :func:`diffq_fx.functional.bits_from_logits` and :func:`diffq_fx.functional.step_size` after each other, in fewer passes.

    Args:
        logits: shape (R, C).
        span: high - low of each range, shape that broadcasts with ``logits``; a constant.
        min_bits: smallest width, in bits.
        max_bits: largest width, in bits.
        gain: see :class:`~diffq_fx.methods.diffq.DiffQConfig`.
        unmoved: a parameter of the weight that has no part in the noise: it gets a gradient of zero, so that
            DistributedDataParallel meets it.

    Returns:
        Steps, the shape of both together.

    Example:
        >>> step_of_logits(torch.zeros(1, 1), torch.ones(1, 1), min_bits=1, max_bits=3, gain=1)
        tensor([[0.3333]])
    """
    return _StepOfLogits.apply(logits, span, unmoved, min_bits, max_bits, gain)


def bits_of_logits(logits: Tensor, *, min_bits: float, max_bits: float, gain: float) -> tuple[Tensor, Tensor]:
    """Bits ``b = b_min + sigmoid(gain l) (b_max - b_min)`` and their derivative ``db/dl``, without autograd.

    Args:
        logits: any shape.
        min_bits: smallest width, in bits.
        max_bits: largest width, in bits.
        gain: see :class:`~diffq_fx.methods.diffq.DiffQConfig`.

    Returns:
        Two tensors of the shape of ``logits``.

    Example:
        >>> bits_of_logits(torch.zeros(1), min_bits=2, max_bits=8, gain=1)
        (tensor([5.]), tensor([1.5000]))
    """
    if native.takes_logits(logits):
        return native.bits(logits, min_bits, max_bits, gain)
    share = torch.sigmoid_(logits * gain)
    bits = (share * (max_bits - min_bits)).add_(min_bits)
    return bits, share.addcmul_(share, share, value=-1).mul_(gain * (max_bits - min_bits))
