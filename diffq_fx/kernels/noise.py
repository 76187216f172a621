"""Pseudo quantization noise: ``w + step * n`` with n independent of w, DiffQ (arXiv:2104.09987).

:func:`add_noise` takes steps and is one registered operator: a node in every graph, opaque to tracers and compilers. :class:`OnePass`
takes logits. Both have bodies that draw the same: C (:mod:`diffq_fx.kernels.native`), Triton (:mod:`diffq_fx.kernels.gpu`) and, the
operator, torch's own operations (:mod:`diffq_fx.kernels.eager`). All that is kept of the noise for the backward is its seed.

Differs from the paper: the range is a constant of the step, so the gradient of the weight is the identity.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout, scale_layout_of
from diffq_fx.kernels import eager, gpu, native
from diffq_fx.kernels.derivatives import first_alone
from diffq_fx.kernels.draws import NoiseSettings, draw_seed


def _add(weight: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Noisy weight, contiguous, and the seed of its noise: int64, shape (1,)."""
    layout, seed = _layout(weight.shape, step, axis, block), draw_seed(weight.device)
    if native.takes(weight, axis):
        return native.add(weight, step, seed, layout, gaussian), seed
    if gpu.takes(weight, layout, axis):
        return gpu.add(weight, step, seed, layout, gaussian), seed
    return eager.add(weight, step, seed, layout, axis, gaussian), seed


def _reduce(grad: Tensor, seed: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
    """Gradient of the step: the sum over each group of ``grad * noise``."""
    layout, grad = _layout(grad.shape, step, axis, block), grad.contiguous() if axis == 0 else grad
    if native.takes(grad, axis):
        return native.reduce(grad, seed, step, layout, gaussian)
    if gpu.takes(grad, layout, axis):
        return gpu.reduce(grad, seed, step, layout, gaussian)
    return eager.reduce(grad, seed, step, layout, axis, gaussian)


def _layout(shape: torch.Size, step: Tensor, axis: int, block: int) -> GroupLayout:
    rows = shape[axis]
    return scale_layout_of(step, rows, math.prod(shape) // rows, block)


torch.library.define(  # custom_op takes no tags before torch 2.7
    "diffq_fx::add_noise",
    "(Tensor weight, Tensor step, SymInt axis, SymInt block, bool gaussian) -> (Tensor noisy, Tensor seed)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
torch.library.impl("diffq_fx::add_noise", "default", _add)


@torch.library.register_fake("diffq_fx::add_noise")
def _(weight, step, axis, block, gaussian):  # noqa: ANN001, ANN202
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(1, dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    _, step, ctx.axis, ctx.block, ctx.gaussian = inputs
    ctx.save_for_backward(output[1], step)


def _backward(ctx, grad: Tensor, _: Tensor):  # noqa: ANN001, ANN202
    seed, step = ctx.saved_tensors
    grad_step = None
    if ctx.needs_input_grad[1]:
        grad_step = torch.ops.diffq_fx.reduce_noise(grad, seed, step, ctx.axis, ctx.block, ctx.gaussian)
    return grad, grad_step, None, None, None


reduce_noise_op = torch.library.custom_op("diffq_fx::reduce_noise", _reduce, mutates_args=())


@reduce_noise_op.register_fake
def _(grad, seed, step, axis, block, gaussian):  # noqa: ANN001, ANN202
    return torch.empty_like(step)


torch.library.register_autograd("diffq_fx::add_noise", _backward, setup_context=_setup_context)


class _AddNoise(torch.autograd.Function):
    """The operator without the dispatcher, which takes longer than the noise of a small weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
        noisy, seed = _add(weight, step, axis, block, gaussian)
        ctx.save_for_backward(seed, step)
        ctx.settings = {"axis": axis, "block": block, "gaussian": gaussian}
        return noisy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seed, step = ctx.saved_tensors
        grad_step = None
        if ctx.needs_input_grad[1]:
            grad_step = first_alone(partial(_reduce, **ctx.settings), grad, seed, step)
        return grad, grad_step, None, None, None


def add_noise(weight: Tensor, step: Tensor, *, axis: int, block: int, gaussian: bool = False) -> Tensor:
    """Add pseudo quantization noise: ``w + step * n``, DiffQ (arXiv:2104.09987).

    ``step`` has the shape (R, C) of a :class:`~diffq_fx.functional.groups.GroupLayout` of the weight with rows along ``axis`` and this
    ``block`` length; its gradient is ``sum(grad * n)`` per group. ``gaussian`` draws N(0, 1/2) in place of U[-1/2, 1/2]. The result is
    contiguous, of the weight's shape and dtype.

    Example:
        >>> weight = torch.zeros(4, 8)
        >>> noisy = add_noise(weight, torch.ones(4, 1), axis=0, block=8)
        >>> bool(noisy.abs().max() < 0.5)
        True
    """
    if native.recorded() or not (native.is_plain(weight) and native.is_plain(step)):
        return torch.ops.diffq_fx.add_noise(weight, step, axis, block, gaussian)[0]
    return _AddNoise.apply(weight, step, axis, block, gaussian)


@dataclass(frozen=True)
class OnePass(NoiseSettings):
    """The range of each group, its step and the noise in one pass over the weight, and one over its gradient backward.

    What :func:`~diffq_fx.kernels.normal_range`, :func:`~diffq_fx.kernels.step_of_logits` and :func:`add_noise` do one after the other: so
    a small weight costs one call, and a large one is read once. No step is kept for the backward, only the length of each range.

    Example:
        >>> layout = GroupLayout.of(4, 8, "channel")
        >>> settings = {"clips": True, "min_bits": 1, "max_bits": 8, "gain": 10, "gaussian": False}
        >>> one_pass = OnePass(axis=0, groups=layout, ranges=layout, grid="affine", **settings)
        >>> weight, logits = torch.randn(4, 8), torch.zeros(4, 1)
        >>> one_pass(weight, logits).shape if one_pass.takes(weight, logits) else weight.shape
        torch.Size([4, 8])
    """

    def takes(self, weight: Tensor, logits: Tensor) -> bool:
        """Whether the C or the Triton kernel can do all of it for this weight, here and now."""
        fits = self.groups.kind != "tensor" and (self.ranges.kind == "channel" or self.ranges == self.groups)
        fits = fits and logits.shape == self.groups.shape and weight.numel() == self.groups.rows * self.groups.columns
        plain = not native.recorded() and native.is_plain(weight) and native.is_plain(logits)
        plain = plain and logits.dtype == torch.float32 and logits.is_contiguous()
        return fits and plain and (native.takes(weight, self.axis) or gpu.takes(weight, self.groups, self.axis))

    def __call__(self, weight: Tensor, logits: Tensor, unmoved: Tensor | None = None) -> Tensor:
        """The noisy weight, contiguous, for what :meth:`takes` agrees to; differentiable in weight and logits.

        ``unmoved`` gets a gradient of zero; see :func:`~diffq_fx.kernels.step_of_logits`.
        """
        return _OnePass.apply(weight, logits, unmoved, self)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, unmoved: Tensor | None, settings: OnePass) -> Tensor:
        seed, ctx.settings, ctx.body = draw_seed(weight.device), settings, native if native.takes(weight, settings.axis) else gpu
        noisy, span = ctx.body.noisy(weight, logits, seed, settings)
        ctx.save_for_backward(logits, span, seed)
        ctx.unmoved = None if unmoved is None else unmoved.shape
        return noisy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, span, seed = ctx.saved_tensors
        grad_logits = None
        if ctx.needs_input_grad[1]:
            grad_logits = first_alone(partial(ctx.body.noisy_backward, settings=ctx.settings), grad, logits, span, seed)
        return grad, grad_logits, None if ctx.unmoved is None else logits.new_zeros(ctx.unmoved), None
