"""Rounding to a grid; in training the gradient of the weight goes straight through, that of a learned range is in closed form."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout, from_rows, to_rows
from diffq_fx.functional.quantization import Grid, QuantParams, dequantize, quantize
from diffq_fx.kernels import gpu, native
from diffq_fx.kernels.derivatives import first_alone

_CLIP_GAIN = 10.0
"""How much faster the range moves than ``clip``: 1 % for an optimizer that changes each parameter by 1e-3 in a step, as Adam does."""
_REACH = 0.5 * (1 + 1e-4)
"""Steps between a weight and its rounded value beyond which it is clipped."""


def round_to_grid(weight: Tensor, params: QuantParams, bits: Tensor, axis: int, layout: GroupLayout) -> Tensor:
    """The nearest weight on a grid, contiguous: quantized and dequantized, by the kernel in C where it runs.

    Example:
        >>> params = QuantParams(torch.tensor([[0.5]]), torch.tensor([[1]]), None)
        >>> round_to_grid(torch.tensor([[0.3, 9.0]]), params, torch.tensor([[2]]), 0, GroupLayout.of(1, 2, "channel"))
        tensor([[0.5000, 1.0000]])
    """
    if params.zero_point is not None and not native.recorded() and native.takes(weight, axis):
        top = 2 ** bits.to(torch.int32) - 1
        return native.round_to_grid(weight.detach(), params.scale, params.zero_point, top, layout)
    levels_OI = quantize(to_rows(weight, axis).to(params.scale.dtype), params, bits, layout)
    return from_rows(dequantize(levels_OI, params, layout).to(weight.dtype), tuple(weight.shape), axis).contiguous()


def learned_factor(clip: Tensor) -> Tensor:
    """What the kept range is multiplied with: ``exp(gain * clip)``, positive wherever training takes ``clip``.

    Example:
        >>> learned_factor(torch.zeros(1))
        tensor([1.])
    """
    return torch.exp(_CLIP_GAIN * clip)


@dataclass(frozen=True)
class RoundInRange:
    """Train with a truly rounded weight and, with ``clip``, its range: LSQ's gradient (arXiv:1902.08153) for a range with a zero point.

    The rounded weight is on a grid that is proportional to ``e = exp(gain * clip)``. Backward, for the weight: 1; for the range:
    ``d rounded / d ln e = rounded - w`` within the range, ``rounded`` for weights clipped to its ends. The sum is scaled
    as LSQ scales that of its step s, ``1 / sqrt(n P)`` for n weights and P steps in the range, and taken relative to s.

    Differs from the paper: the step is learned by its logarithm, so that a grid of 8 bits moves at the pace of one of 2 bits,
    and a clipped weight keeps its gradient.

    Example:
        >>> layout, clip = GroupLayout.of(1, 2, "channel"), torch.zeros(1, 1, requires_grad=True)
        >>> weight, rounded = torch.tensor([[0.4, 9.0]], requires_grad=True), torch.tensor([[0.0, 3.0]])  # 9 is clipped
        >>> round_in_range = RoundInRange(axis=0, groups=layout, ranges=layout)
        >>> round_in_range(weight, rounded, torch.zeros(1, 1), clip, torch.ones(1, 1), torch.full((1, 1), 3.0)).sum().backward()
        >>> weight.grad, bool(clip.grad > 0)
        (tensor([[1., 1.]]), True)
    """

    axis: int
    """Of the output channels."""
    groups: GroupLayout
    """The groups that have a scale."""
    ranges: GroupLayout
    """The groups that share a range."""
    grid: Grid = "affine"

    def __call__(self, weight: Tensor, rounded: Tensor, logits: Tensor, clip: Tensor | None, scale: Tensor, span: Tensor) -> Tensor:
        """The values of ``rounded``, differentiable in weight and ``clip`` (None for ranges that are not learned).

        ``scale`` has the shape of ``groups``, ``span``, the length of each range, that of ``ranges``. ``logits`` get a gradient of zero.
        """
        return _RoundInRange.apply(self, weight, rounded, logits, clip, scale, span)

    def takes(self, weight: Tensor, width: Tensor) -> bool:
        """Whether one kernel can do all of it, from the kept range on, for this weight, here and now."""
        plain = not native.recorded() and native.is_plain(weight)
        return plain and gpu.takes_ranges(weight, width, self.groups, self.ranges, self.grid, self.axis)

    def in_one_pass(self, weight: Tensor, logits: Tensor, clip: Tensor | None, low: Tensor, high: Tensor, width: Tensor) -> Tensor:
        """The same from the kept range ``[low, high]`` on, where :meth:`takes` says so.

        ``width`` is float32, near whole numbers, one or one for each of the groups that have a width.
        """
        return _RoundInOnePass.apply(self, weight, logits, clip, low, high, width)

    def slope_in_one_pass(self, grad: Tensor, weight: Tensor, factor: Tensor, *kept: Tensor) -> Tensor:
        """The gradient of ``clip``; the rounded weight is made again."""
        return gpu.slope_of_clip(grad, weight, factor, kept, self.groups, self.grid, _REACH, _CLIP_GAIN)

    def slope_of_clip(self, grad: Tensor, weight: Tensor, rounded: Tensor, clip: Tensor, scale: Tensor, span: Tensor) -> Tensor:
        """The gradient of ``clip``, without autograd."""
        rows = (to_rows(each, self.axis) for each in (grad, weight, rounded))
        slope, step = _slope_of_range(*rows, scale=scale, groups=self.groups), scale
        for along, size in enumerate(clip.shape):
            if size == 1 < step.shape[along]:
                slope, step = slope.sum(along, keepdim=True), step.amax(along, keepdim=True)
        steps_in_range = (span / step).clamp(min=1)  # a range of no length has a step of 1
        lsq_scale = (self.ranges.counts_on(step.device) * steps_in_range).rsqrt_()
        return slope.mul_(lsq_scale).div_(step.square().mul_(_CLIP_GAIN)).to(clip.dtype)


class _RoundInRange(torch.autograd.Function):
    """The rounded weight; its gradient goes to the weight as it is and to the range in closed form."""

    @staticmethod
    def forward(ctx: Any, kernel: RoundInRange, weight: Tensor, rounded: Tensor, *others: Tensor | None) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(weight, rounded, *others)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rounded, logits, clip, scale, span = ctx.saved_tensors
        grad_clip = None
        if clip is not None and ctx.needs_input_grad[4]:
            grad_clip = first_alone(ctx.kernel.slope_of_clip, grad, weight, rounded, clip, scale, span)
        # A zero for the bits, which are final, so that DistributedDataParallel meets them.
        return None, grad, None, torch.zeros_like(logits), grad_clip, None, None


class _RoundInOnePass(torch.autograd.Function):
    """The same from the kept range on, where one kernel does all of it and the backward makes the rounded weight again."""

    @staticmethod
    def forward(ctx: Any, kernel: RoundInRange, weight: Tensor, logits: Tensor, clip: Tensor | None, *kept: Tensor) -> Tensor:
        factor, (low, high, width) = None if clip is None else learned_factor(clip), kept
        ctx.kernel = kernel
        ctx.save_for_backward(weight, logits, factor, low, high, width)
        return gpu.round_in_range(weight, low, high, factor, width, kernel.groups, kernel.grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, logits, factor, *kept = ctx.saved_tensors
        grad_clip = None
        if factor is not None and ctx.needs_input_grad[3]:
            grad_clip = first_alone(ctx.kernel.slope_in_one_pass, grad, weight, factor, *kept)
        return None, grad, torch.zeros_like(logits), grad_clip, None, None, None


def _slope_of_range(grad_OI: Tensor, weight_OI: Tensor, rounded_OI: Tensor, scale: Tensor, groups: GroupLayout) -> Tensor:
    """Derivative of the loss in the logarithm of each group's range, shape of ``scale``."""
    if native.takes_rows(grad_OI, weight_OI, rounded_OI):
        return native.range_slope(grad_OI, weight_OI, rounded_OI, scale, groups, _REACH)
    error_OI = (rounded_OI.to(scale.dtype)).sub(weight_OI)
    clipped_OI = error_OI.abs() > groups.expand(scale) * _REACH
    return groups.sum(torch.where(clipped_OI, rounded_OI, error_OI).mul_(grad_OI))
