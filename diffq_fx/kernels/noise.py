"""Pseudo quantization noise as one registered operator: a node in every graph, opaque to tracers and compilers.

``w + step * n`` with n independent of w, DiffQ (arXiv:2104.09987). What is kept for the backward is at most one byte per weight:
nothing but the seed where the C kernel runs (:mod:`diffq_fx.kernels.native`), the bytes drawn elsewhere
(:mod:`diffq_fx.kernels.eager`).

Differs from the paper: the range is a constant of the step, so the gradient of the weight is the identity.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout, scale_layout_of
from diffq_fx.kernels import eager, native
from diffq_fx.kernels.derivatives import first_alone


def _add(weight: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Noisy weight, contiguous, and what the backward needs to know of the noise: a seed (int64) or the bytes (int8)."""
    layout = _layout(weight.shape, step, axis, block)
    if native.takes(weight, axis):
        return native.add(weight, step, layout, gaussian)
    return eager.add(weight, step, layout, axis, gaussian)


def _reduce(grad: Tensor, kept: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
    layout = _layout(grad.shape, step, axis, block)
    if kept.dtype == torch.int64:
        return native.reduce(grad, kept, step, layout, gaussian)
    return eager.reduce(grad, kept, step, layout, axis, gaussian)


def _layout(shape: torch.Size, step: Tensor, axis: int, block: int) -> GroupLayout:
    rows = shape[axis]
    return scale_layout_of(step, rows, math.prod(shape) // rows, block)


torch.library.define(  # custom_op takes no tags before torch 2.7
    "diffq_fx::add_noise",
    "(Tensor weight, Tensor step, SymInt axis, SymInt block, bool gaussian) -> (Tensor noisy, Tensor kept)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
torch.library.impl("diffq_fx::add_noise", "default", _add)


@torch.library.register_fake("diffq_fx::add_noise")
def _(weight, step, axis, block, gaussian):  # noqa: ANN001, ANN202
    by_seed = native.takes(weight, axis)
    kept = weight.new_empty(1, dtype=torch.int64) if by_seed else weight.new_empty(weight.numel(), dtype=torch.int8)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), kept


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    _, step, ctx.axis, ctx.block, ctx.gaussian = inputs
    ctx.save_for_backward(output[1], step)


def _backward(ctx, grad: Tensor, _: Tensor):  # noqa: ANN001, ANN202
    kept, step = ctx.saved_tensors
    grad_step = None
    if ctx.needs_input_grad[1]:
        grad_step = torch.ops.diffq_fx.reduce_noise(grad, kept, step, ctx.axis, ctx.block, ctx.gaussian)
    return grad, grad_step, None, None, None


@torch.library.custom_op("diffq_fx::reduce_noise", mutates_args=())
def reduce_noise_op(grad: Tensor, kept: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
    """Gradient of the step: the sum over each group of ``grad * noise``."""
    return _reduce(grad, kept, step, axis, block, gaussian)


@reduce_noise_op.register_fake
def _(grad, kept, step, axis, block, gaussian):  # noqa: ANN001, ANN202
    return torch.empty_like(step)


torch.library.register_autograd("diffq_fx::add_noise", _backward, setup_context=_setup_context)


class _AddNoise(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than the noise of a small weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
        noisy, kept = _add(weight, step, axis, block, gaussian)
        ctx.save_for_backward(kept, step)
        ctx.settings = {"axis": axis, "block": block, "gaussian": gaussian}
        return noisy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, step = ctx.saved_tensors
        grad_step = None
        if ctx.needs_input_grad[1]:
            grad_step = first_alone(partial(_reduce, **ctx.settings), grad, kept, step)
        return grad, grad_step, None, None, None


def add_noise(weight: Tensor, step: Tensor, *, axis: int, block: int, gaussian: bool = False) -> Tensor:
    """Add pseudo quantization noise: ``w + step * n``, DiffQ (arXiv:2104.09987).

    Args:
        weight: float, any shape.
        step: shape (R, C) of a :class:`~diffq_fx.functional.groups.GroupLayout` of the weight; its gradient is ``sum(grad * n)`` per group.
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
    if native.recorded() or not (native.is_plain(weight) and native.is_plain(step)):
        return torch.ops.diffq_fx.add_noise(weight, step, axis, block, gaussian)[0]
    return _AddNoise.apply(weight, step, axis, block, gaussian)
