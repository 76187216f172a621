"""The range of each weight's groups, their steps and the noise in one pass over the weights, and one over their gradient backward.

What :func:`~diffq_fx.kernels.normal_range`, :func:`~diffq_fx.kernels.step_of_logits` and :func:`~diffq_fx.kernels.add_noise` do one
after the other, where the C or the Triton kernel runs and nothing records the operations: so a small weight costs one call, and a
large one is read once. No step is kept for the backward, only the length of each range.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffq_fx.functional.grid import Grid
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import gpu, native
from diffq_fx.kernels.derivatives import first_alone
from diffq_fx.kernels.draws import draw_seed


@dataclass(frozen=True)
class OnePass:
    """What the kernel has to know of one weight; see :class:`~diffq_fx.methods.diffq.DiffQConfig` for the settings.

    Example:
        >>> layout = GroupLayout.of(4, 8, "channel")
        >>> settings = {"clips": True, "min_bits": 1, "max_bits": 8, "gain": 10, "gaussian": False}
        >>> one_pass = OnePass(axis=0, groups=layout, ranges=layout, grid="affine", **settings)
        >>> weight, logits = torch.randn(4, 8), torch.zeros(4, 1)
        >>> one_pass(weight, logits).shape if one_pass.takes(weight, logits) else weight.shape
        torch.Size([4, 8])
    """

    axis: int
    groups: GroupLayout
    """The groups that share a number of bits."""
    ranges: GroupLayout
    grid: Grid
    clips: bool
    """Whether the range is that of normal weights and not that of the extreme ones."""
    min_bits: float
    max_bits: float
    gain: float
    gaussian: bool

    def takes(self, weight: Tensor, logits: Tensor) -> bool:
        """Whether the kernel can do all of it for this weight, here and now."""
        fits = self.groups.kind != "tensor" and (self.ranges.kind == "channel" or self.ranges == self.groups)
        fits = fits and logits.shape == self.groups.shape and weight.numel() == self.groups.rows * self.groups.columns
        plain = not native.recorded() and native.is_plain(weight) and native.is_plain(logits)
        plain = plain and logits.dtype == torch.float32 and logits.is_contiguous()
        return fits and plain and (native.takes(weight, self.axis) or gpu.takes(weight, self.groups, self.axis))

    def __call__(self, weight: Tensor, logits: Tensor, unmoved: Tensor | None = None) -> Tensor:
        """``w + step(b) * n``, DiffQ (arXiv:2104.09987), for what :meth:`takes` agrees to; differentiable in weight and logits.

        Args:
            weight: float32.
            logits: shape of ``groups``.
            unmoved: gets a gradient of zero; see :func:`~diffq_fx.kernels.step_of_logits`.

        Returns:
            The noisy weight, contiguous, of the weight's shape.
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
