"""Pseudo quantization noise: ``w + step * n`` with n independent of w, DiffQ (arXiv:2104.09987).

:class:`Noise` takes the logits of the bits. It is one registered operator forward and one backward: a node each in every graph, opaque to
tracers and compilers. Its bodies draw the same: C (:mod:`diffq_fx.kernels.native`) and Triton (:mod:`diffq_fx.kernels.gpu`) make range,
steps and noise in one pass; elsewhere the parts follow each other, with the noise itself in C, Triton or torch's own operations
(:mod:`diffq_fx.kernels.eager`). All that is kept for the backward is the seed of the noise and the length of each range.

Differs from the paper: the range is a constant of the step, so the gradient of the weight is the identity.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout, combine, largest_in, scale_layout_of, to_rows
from diffq_fx.functional.quantization import bits_from_logits, grid_range
from diffq_fx.kernels import eager, gpu, native
from diffq_fx.kernels.bits import slope_of_step, step_of_logits
from diffq_fx.kernels.derivatives import first_alone
from diffq_fx.kernels.draws import GAUSSIAN_STD, draw_seed
from diffq_fx.kernels.ranges import extremes, normal_range
from diffq_fx.kernels.settings import OF_NOISE, NoiseSettings


def add(weight: Tensor, step: Tensor, seed: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
    """The weight with noise of these steps, contiguous; without autograd.

    ``step`` has the shape (R, C) of a :class:`~diffq_fx.functional.groups.GroupLayout` of the weight with rows along ``axis`` and this
    ``block`` length.
    """
    layout = _layout(weight.shape, step, axis, block)
    if native.takes(weight, axis):
        return native.add(weight, step, seed, layout, gaussian)
    if gpu.takes(weight, layout, axis):
        return gpu.add(weight, step, seed, layout, gaussian)
    return eager.add(weight, step, seed, layout, axis, gaussian)


def reduce(grad: Tensor, seed: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> Tensor:
    """Gradient of the steps: the sum over each group of ``grad * noise``."""
    layout = _layout(grad.shape, step, axis, block)
    if native.takes(grad, axis):
        return native.reduce(grad, seed, step, layout, gaussian)
    if gpu.takes(grad, layout, axis):
        return gpu.reduce(grad, seed, step, layout, gaussian)
    return eager.reduce(grad, seed, step, layout, axis, gaussian)


def _layout(shape: torch.Size, step: Tensor, axis: int, block: int) -> GroupLayout:
    rows = shape[axis]
    return scale_layout_of(step, rows, math.prod(shape) // rows, block)


@dataclass(frozen=True)
class Noise(NoiseSettings):
    """The noise of one weight: ``w + step * n`` with ``step = span / (2^b - 1)`` and ``b = b_min + sigmoid(gain l) (b_max - b_min)``.

    n is uniform over [-1/2, 1/2] or, ``gaussian``, N(0, 1/2).

    Example:
        >>> layout = GroupLayout.of(4, 8, "channel")
        >>> settings = {"clips": True, "min_bits": 1, "max_bits": 8, "gain": 10, "gaussian": False}
        >>> noise = Noise(axis=0, groups=layout, ranges=layout, grid="affine", **settings)
        >>> noise(torch.randn(4, 8), torch.zeros(4, 1)).shape
        torch.Size([4, 8])
    """

    def __call__(self, weight: Tensor, logits: Tensor, unmoved: Tensor | None = None) -> Tensor:
        """The noisy weight, contiguous, of the weight's shape and dtype; differentiable in weight and logits.

        ``unmoved`` is a parameter of the weight that has no part in the noise: it gets a gradient of zero, so that
        DistributedDataParallel meets it.
        """
        if native.recorded() or not (native.is_plain(weight) and native.is_plain(logits)):
            return torch.ops.diffq_fx.add_noise(weight, logits, unmoved, *self.arguments())[0]
        return _AddNoise.apply(weight, logits, unmoved, self)  # the dispatcher takes longer than the noise of a small weight

    def in_one_pass(self, weight: Tensor, logits: Tensor) -> ModuleType | None:
        """The body that can make range, steps and noise of this weight in one pass, here and now."""
        fits = self.groups.kind != "tensor" and (self.ranges.kind == "channel" or self.ranges == self.groups)
        fits = fits and logits.shape == self.groups.shape and weight.numel() == self.groups.rows * self.groups.columns
        if not (fits and logits.dtype == torch.float32 and logits.is_contiguous()):
            return None
        return native if native.takes(weight, self.axis) else gpu if gpu.takes(weight, self.groups, self.axis) else None

    def span_and_growth(self, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The length of each range and, where it depends on the bits, how fast its logarithm to base 2 grows; without autograd."""
        rows_OI, ranges = to_rows(weight.detach(), self.axis), self.ranges
        if not self.clips:
            low, high = grid_range(*extremes(rows_OI, ranges), self.grid)
            return high - low, None
        bits = bits_from_logits(largest_in(logits.detach(), ranges.shape), self.min_bits, self.max_bits, self.gain)
        low, high, growth = normal_range(rows_OI, ranges, bits, self.grid)
        return high - low, growth

    def draw(self, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The noisy weight; the length of each range and its growth, (2, R, C); the seed, int64, (1,); the steps if they are at hand."""
        seed, body = draw_seed(weight.device), self.in_one_pass(weight, logits)
        if body is not None:
            return *body.noisy(weight, logits, seed, self), seed, None
        length, growth = self.span_and_growth(weight, logits)
        step = step_of_logits(logits, length, self._bits())
        noisy = add(weight, step, seed, self.axis, self._block(), self.gaussian)
        return noisy, torch.stack((length, torch.zeros_like(length) if growth is None else growth)), seed, step

    def slope(self, grad: Tensor, logits: Tensor, span: Tensor, seed: Tensor, step: Tensor | None = None) -> Tensor:
        """The gradient of the logits, the noise made again from its seed, and the steps too if need be."""
        grad = grad.contiguous() if self.axis == 0 else grad
        body = self.in_one_pass(grad, logits) if step is None else None
        if body is not None:
            return body.noisy_backward(grad, logits, span, seed, self)
        length, growth = span.unbind()
        step = step_of_logits(logits, length, self._bits()) if step is None else step
        of_step = reduce(grad, seed, step, self.axis, self._block(), self.gaussian)
        return slope_of_step(of_step, logits, length, step, growth=growth if self.clips else None, bits=self._bits())

    def squared(self, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Expected sum of the squared noise of each group's weights, and how that of all grows with each logit, shape of ``logits``."""
        length, growth = self.span_and_growth(weight, logits)
        step = step_of_logits(logits, length, self._bits())
        variance = combine(self.groups, self.ranges).counts_on(step.device) * (GAUSSIAN_STD**2 if self.gaussian else 1 / 12)
        slope = slope_of_step(2 * variance * step, logits, length, step, growth=growth, bits=self._bits())
        return (variance * step.square()).sum_to_size(logits.shape), slope

    def _bits(self) -> tuple[float, float, float]:
        return self.min_bits, self.max_bits, self.gain

    def _block(self) -> int:
        return combine(self.groups, self.ranges).block


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, unmoved: Tensor | None, noise: Noise) -> Tensor:
        noisy, *kept = noise.draw(weight, logits)
        ctx.save_for_backward(logits, *kept)
        ctx.noise, ctx.unmoved = noise, None if unmoved is None else unmoved.shape
        return noisy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, *kept = ctx.saved_tensors
        grad_logits = first_alone(ctx.noise.slope, grad, logits, *kept) if ctx.needs_input_grad[1] else None
        return grad, grad_logits, None if ctx.unmoved is None else logits.new_zeros(ctx.unmoved), None


torch.library.define(  # custom_op takes no tags before torch 2.7
    "diffq_fx::add_noise",
    f"(Tensor weight, Tensor logits, Tensor? unmoved, {OF_NOISE}) -> (Tensor noisy, Tensor span, Tensor seed)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
torch.library.define(
    "diffq_fx::slope_of_noise",
    f"(Tensor grad, Tensor logits, Tensor span, Tensor seed, {OF_NOISE}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("diffq_fx::add_noise", "default")
def _(weight, logits, unmoved, *arguments):  # noqa: ANN001, ANN002, ANN202
    return Noise.of(weight.shape, *arguments).draw(weight.detach(), logits.detach())[:3]


@torch.library.impl("diffq_fx::slope_of_noise", "default")
def _(grad, logits, span, seed, *arguments):  # noqa: ANN001, ANN002, ANN202
    return Noise.of(grad.shape, *arguments).slope(grad.detach(), logits.detach(), span, seed)


@torch.library.register_fake("diffq_fx::add_noise")
def _(weight, logits, unmoved, *arguments):  # noqa: ANN001, ANN002, ANN202
    noisy = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    span = weight.new_empty((2, *Noise.of(weight.shape, *arguments).ranges.shape), dtype=dtype)
    return noisy, span, weight.new_empty(1, dtype=torch.int64)


@torch.library.register_fake("diffq_fx::slope_of_noise")
def _(grad, logits, *others):  # noqa: ANN001, ANN002, ANN202
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    _, logits, unmoved, *ctx.arguments = inputs
    ctx.save_for_backward(logits, *output[1:])
    ctx.unmoved = None if unmoved is None else unmoved.shape


def _backward(ctx, grad: Tensor, *_: Tensor):  # noqa: ANN001, ANN202
    logits, span, seed = ctx.saved_tensors
    slope = None
    if ctx.needs_input_grad[1]:
        slope = torch.ops.diffq_fx.slope_of_noise(grad, logits, span, seed, *ctx.arguments)
    unmoved = None if ctx.unmoved is None else logits.new_zeros(ctx.unmoved)
    return grad, slope, unmoved, *(None for _ in ctx.arguments)


torch.library.register_autograd("diffq_fx::add_noise", _backward, setup_context=_setup_context)
