"""Rounding to a grid; in training the gradient of the weight goes straight through, that of a learned range is in closed form."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout, from_rows, largest_in, to_rows
from diffq_fx.functional.quantization import QuantParams, dequantize, quant_params, quantize
from diffq_fx.kernels import gpu, native
from diffq_fx.kernels.derivatives import first_alone
from diffq_fx.kernels.settings import OF_GROUPS, GroupSettings

_CLIP_GAIN = 10.0
"""How much faster the range moves than ``clip``: 1 % for an optimizer that changes each parameter by 1e-3 in a step, as Adam does."""
_OF_ROUNDING = f"{OF_GROUPS}, ScalarType scale_dtype"
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
class RoundInRange(GroupSettings):
    """Train with a truly rounded weight and, with ``clip``, its range: LSQ's gradient (arXiv:1902.08153) for a range with a zero point.

    The rounded weight is on a grid that is proportional to ``e = exp(gain * clip)``. Backward, for the weight: 1; for the range:
    ``d rounded / d ln e = rounded - w`` within the range, ``rounded`` for weights clipped to its ends. The sum is scaled
    as LSQ scales that of its step s, ``1 / sqrt(n P)`` for n weights and P steps in the range, and taken relative to s.

    Differs from the paper: the step is learned by its logarithm, so that a grid of 8 bits moves at the pace of one of 2 bits,
    and a clipped weight keeps its gradient.

    Example:
        >>> layout, clip = GroupLayout.of(1, 2, "channel"), torch.zeros(1, 1, requires_grad=True)
        >>> weight = torch.tensor([[0.4, 9.0]], requires_grad=True)  # 9 is clipped
        >>> round_in_range = RoundInRange(axis=0, groups=layout, ranges=layout, grid="affine")
        >>> kept = torch.zeros(1, 1), torch.full((1, 1), 3.0), torch.full((1, 1), 2.0)  # both ends and the width
        >>> rounded = round_in_range(weight, torch.zeros(1, 1), clip, *kept)
        >>> rounded.sum().backward()
        >>> rounded.detach(), weight.grad, bool(clip.grad > 0)
        (tensor([[0., 3.]]), tensor([[1., 1.]]), True)
    """

    scale_dtype: torch.dtype = torch.float32
    """float16 where scales are values of that."""

    def __call__(self, weight: Tensor, logits: Tensor, clip: Tensor | None, low: Tensor, high: Tensor, width: Tensor) -> Tensor:
        """The rounded weight, differentiable in weight and ``clip`` (None for ranges that are not learned).

        ``low`` and ``high`` are the ends of the range where ``clip`` is 0. ``width`` is float32, near whole numbers, one or one for each of
        the groups that have a width. ``logits`` get a gradient of zero.
        """
        if native.recorded() or not native.is_plain(weight):
            return torch.ops.diffq_fx.round_in_range(weight, logits, clip, low, high, width, *self.arguments())
        return _RoundInRange.apply(self, weight, logits, clip, low, high, width)  # as noise does, past the dispatcher

    def arguments(self) -> tuple[Any, ...]:
        """The settings as an operator takes them."""
        return *super().arguments(), self.scale_dtype

    def in_one_pass(self, weight: Tensor, width: Tensor) -> bool:
        """Whether one kernel can do all of it, which then makes the rounded weight again in the backward."""
        return self.scale_dtype == torch.float32 and gpu.takes_ranges(weight, width, self.groups, self.ranges, self.grid, self.axis)

    def round(self, weight: Tensor, clip: Tensor | None, low: Tensor, high: Tensor, width: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The rounded weight, and what :meth:`slope` takes beside the gradient and the weight; without autograd."""
        factor = None if clip is None else learned_factor(clip)
        if self.in_one_pass(weight, width):
            return gpu.round_in_range(weight, low, high, factor, width, self.groups, self.grid), [None, factor, low, high, width]
        params, bits, span = self._grid_of(factor, low, high, width)
        rounded = round_to_grid(weight.detach(), params, bits, self.axis, self.groups)
        return rounded, [rounded, params.scale, span]

    def _grid_of(self, factor: Tensor | None, low: Tensor, high: Tensor, width: Tensor) -> tuple[QuantParams, Tensor, Tensor]:
        low, high = (low, high) if factor is None else (low * factor, high * factor)
        bits = width.round().to(torch.int32)
        return quant_params(low, high, bits, self.grid, self.scale_dtype), bits, high - low

    def slope(self, grad: Tensor, weight: Tensor, rounded: Tensor | None, *kept: Tensor) -> Tensor:
        """The gradient of ``clip``; without autograd."""
        if rounded is None:
            factor, *others = kept
            return gpu.slope_of_clip(grad, weight, factor, others, self.groups, self.grid, _REACH, _CLIP_GAIN)
        scale, span = kept
        rows = (to_rows(each, self.axis) for each in (grad, weight, rounded))
        slope, step = _slope_of_range(*rows, scale=scale, groups=self.groups).sum_to_size(span.shape), largest_in(scale, span.shape)
        steps_in_range = (span / step).clamp(min=1)  # a range of no length has a step of 1
        lsq_scale = (self.ranges.counts_on(step.device) * steps_in_range).rsqrt_()
        return slope.mul_(lsq_scale).div_(step.square().mul_(_CLIP_GAIN)).float()


class _RoundInRange(torch.autograd.Function):
    """The rounded weight; its gradient goes to the weight as it is and to the range in closed form."""

    @staticmethod
    def forward(ctx: Any, kernel: RoundInRange, weight: Tensor, logits: Tensor, clip: Tensor | None, *others: Tensor) -> Tensor:
        rounded, kept = kernel.round(weight, clip, *others)
        ctx.kernel = kernel
        ctx.save_for_backward(weight, logits, *kept)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, logits, *kept = ctx.saved_tensors
        grad_clip = first_alone(ctx.kernel.slope, grad, weight, *kept) if ctx.needs_input_grad[3] else None
        # A zero for the bits, which are final, so that DistributedDataParallel meets them.
        return None, grad, torch.zeros_like(logits), grad_clip, None, None, None


torch.library.define(
    "diffq_fx::round_in_range",
    f"(Tensor weight, Tensor logits, Tensor? clip, Tensor low, Tensor high, Tensor width, {_OF_ROUNDING}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "diffq_fx::slope_of_clip",
    f"(Tensor grad, Tensor weight, Tensor rounded, Tensor clip, Tensor low, Tensor high, Tensor width, {_OF_ROUNDING}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("diffq_fx::round_in_range", "default")
def _(weight, logits, clip, low, high, width, *arguments):  # noqa: ANN001, ANN002, ANN202
    return RoundInRange.of(weight.shape, *arguments).round(weight.detach(), clip, low, high, width)[0]


@torch.library.impl("diffq_fx::slope_of_clip", "default")
def _(grad, weight, rounded, clip, low, high, width, *arguments):  # noqa: ANN001, ANN002, ANN202
    kernel, factor = RoundInRange.of(weight.shape, *arguments), learned_factor(clip)
    if kernel.in_one_pass(weight, width):
        return kernel.slope(grad, weight, None, factor, low, high, width)
    params, _, span = kernel._grid_of(factor, low, high, width)
    return kernel.slope(grad, weight, rounded, params.scale, span)


@torch.library.register_fake("diffq_fx::round_in_range")
def _(weight, *others):  # noqa: ANN001, ANN002, ANN202
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.register_fake("diffq_fx::slope_of_clip")
def _(grad, weight, rounded, clip, *others):  # noqa: ANN001, ANN002, ANN202
    return torch.empty_like(clip, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    weight, logits, clip, low, high, width, *ctx.arguments = inputs
    ctx.save_for_backward(weight, output, clip, low, high, width)
    ctx.logits = logits.shape


def _backward(ctx, grad: Tensor):  # noqa: ANN001, ANN202
    slope = torch.ops.diffq_fx.slope_of_clip(grad, *ctx.saved_tensors, *ctx.arguments) if ctx.needs_input_grad[2] else None
    return grad, grad.new_zeros(ctx.logits, dtype=torch.float32), slope, None, None, None, *(None for _ in ctx.arguments)


torch.library.register_autograd("diffq_fx::round_in_range", _backward, setup_context=_setup_context)


def _slope_of_range(grad_OI: Tensor, weight_OI: Tensor, rounded_OI: Tensor, scale: Tensor, groups: GroupLayout) -> Tensor:
    """Derivative of the loss in the logarithm of each group's range, shape of ``scale``."""
    if native.takes_rows(grad_OI, weight_OI, rounded_OI):
        return native.range_slope(grad_OI, weight_OI, rounded_OI, scale, groups, _REACH)
    error_OI = (rounded_OI.to(scale.dtype)).sub(weight_OI)
    clipped_OI = error_OI.abs() > groups.expand(scale) * _REACH
    return groups.sum(torch.where(clipped_OI, rounded_OI, error_OI).mul_(grad_OI))
