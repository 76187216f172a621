"""LSQ: the step of a uniform quantizer is a parameter, trained with the weights (Esser et al., arXiv:1902.08153).

Shape legend: O rows (output channels), I columns, R x C the grid of groups that share a step.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffq_fx import functional
from diffq_fx.functional import Grid, QuantParams, quant_params
from diffq_fx.functional.groups import GroupLayout, GroupSize, from_rows, to_rows
from diffq_fx.kernels import least_error_range, rounding_errors
from diffq_fx.methods.base import SUMS
from diffq_fx.methods.fixed import FixedBits, FixedBitsQuantizer
from diffq_fx.weights import WeightSpec

_FINENESS = 0.06
"""Of the search for the first step, as a part of the step."""
_FURTHEST = 20.0
"""Logarithm of what a step may grow or shrink by."""
_GAIN = 10.0
"""How much faster the logarithm of a step moves than ``moved``: Adam at a rate of 1e-3 changes a step by 1 %."""


@dataclass(frozen=True, kw_only=True)
class LSQ(FixedBits):
    """Learned step size quantization: ``clamp(round(w / s), -2^(b-1), 2^(b-1) - 1) s``, s trainable (Esser et al., arXiv:1902.08153).

    The steps are parameters of the prepared model and train with any optimizer over its ``parameters()``.

    Differs from the paper: each output channel has a step, which is learned by its logarithm and starts where the squared rounding error is
    least; activations stay in float. The paper has one step a layer, ``group_size="tensor", start="mean", learned="step"``, and SGD.
    Adam moves every parameter by up to its rate, whatever the gradient: at 1e-3 it changes a step of 0.01 by a tenth at once and one of 1
    hardly; by its logarithm both change by a hundredth.

    Raises:
        ValueError: a setting is out of its range, with the value found.

    Example:
        >>> LSQ(bits=1)
        Traceback (most recent call last):
        ...
        ValueError: LSQ: bits must be a whole number from 2 to 16, got 1.
    """

    start: Literal["least_error", "mean"] = "least_error"
    """Where steps start: at the least squared rounding error of the weights, or at the paper's ``2 mean|w| / sqrt(2^(b-1) - 1)``."""
    learned: Literal["logarithm", "step"] = "logarithm"
    """What of a step the optimizer moves."""

    least_bits: ClassVar[int] = 2

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """One width for all, a symmetric grid, steps as ``group_size`` says."""
        return "tensor", self.group_size, "symmetric"

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "LSQWeight":
        """Make the quantizer of one weight; its step starts from the weight."""
        return LSQWeight(spec, self, weight)


class LSQWeight(FixedBitsQuantizer):
    """Rounding with a trainable step per group.

    Parameters:
        moved: float32, shape of the spec's ``scale_layout``: how far each step, or a tenth of its logarithm, has moved from its start.

    Buffers:
        start: float32, the same shape, positive: the steps at the start.
    """

    moved: nn.Parameter
    start: Tensor

    def __init__(self, spec: WeightSpec, config: LSQ, weight: Tensor) -> None:
        super().__init__(spec, config.bits, weight.device)
        self.config = config
        rows_OI = to_rows(weight.detach(), spec.axis).float()
        start = (least_error_step if config.start == "least_error" else mean_step)(rows_OI, spec.scale_layout, config.bits)
        self.register_buffer("start", start)
        self.register_buffer("learned_for", start.new_zeros(SUMS))
        self.moved = nn.Parameter(torch.zeros_like(start))

    def step(self) -> Tensor:
        """The steps, shape of the spec's ``scale_layout``, positive wherever training takes ``moved``; differentiable in it."""
        if self.config.learned == "logarithm":
            return self.start * (_GAIN * self.moved).clamp(-_FURTHEST, _FURTHEST).exp()
        return (self.start + self.moved).abs().clamp(min=torch.finfo(torch.float32).tiny)

    def training_weight(self, weight: Tensor) -> Tensor:
        """The rounded weight, differentiable in the weight and the step."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.note_learned_for(weight)
        spec = self.spec
        rows_OI = to_rows(weight, spec.axis)
        rounded_OI = learned_step(rows_OI, self.step(), spec.scale_layout, self.config.bits)
        return from_rows(rounded_OI, spec.shape, spec.axis).contiguous()

    def params(self, rows_OI: Tensor, bits: Tensor) -> QuantParams:
        """The learned steps; those of least error where another weight has come in place of one that did not train beside them."""
        another = self.is_learned_for_another()
        step = least_error_step(rows_OI, self.spec.scale_layout, self.config.bits) if another else self.step().detach()
        return QuantParams(step, torch.full_like(step, 2 ** (self.config.bits - 1), dtype=torch.int32), None)


def mean_step(rows_OI: Tensor, layout: GroupLayout, bits: int) -> Tensor:
    """The paper's step to start from: ``2 mean|w| / sqrt(2^(b-1) - 1)``, LSQ (arXiv:1902.08153); 1 for a group of zeros.

    Example:
        >>> mean_step(torch.tensor([[1.0, -3.0]]), GroupLayout.of(1, 2, "channel"), 2)
        tensor([[4.]])
    """
    mean = layout.sum(rows_OI.abs()) / layout.counts_on(rows_OI.device)
    step = 2 * mean / math.sqrt(2 ** (bits - 1) - 1)
    return torch.where(step > 0, step, torch.ones_like(step))


def least_error_step(rows_OI: Tensor, layout: GroupLayout, bits: int) -> Tensor:
    """The step with the smallest ``||clamp(round(w / s), -2^(b-1), 2^(b-1) - 1) s - w||^2``, by search; 1 for a group of zeros.

    Example:
        >>> rows = torch.tensor([[-0.5] * 9 + [0.5] * 9 + [2.0]])  # one outlier
        >>> 0.4 < float(least_error_step(rows, GroupLayout.of(1, 19, "channel"), 2)) < 0.6
        True
    """
    width = torch.full((1, 1), bits, dtype=torch.int32, device=rows_OI.device)
    widest = quant_params(*functional.grid_range(*layout.aminmax(rows_OI), "symmetric"), width, "symmetric").scale
    best = quant_params(*least_error_range(rows_OI, layout, width, layout, "symmetric"), width, "symmetric").scale
    # Ranges that span the weights have one level more above zero than LSQ: its largest level may want a larger step than they have.
    most = (2**bits - 1) / (2**bits - 2)
    factors = torch.arange(1 + _FINENESS, most + _FINENESS, _FINENESS).clamp(max=most).tolist()
    steps_KRC = torch.stack([best, *(widest * factor for factor in factors)])
    middle_KRC = torch.full_like(steps_KRC, 2 ** (bits - 1), dtype=torch.int32)
    errors_KRC = rounding_errors(rows_OI, QuantParams(steps_KRC, middle_KRC, None), width, layout)
    return steps_KRC.gather(0, errors_KRC.argmin(0, keepdim=True))[0]


class _LearnedStep(torch.autograd.Function):
    """Rounding in the forward, LSQ's gradients in closed form in the backward."""

    @staticmethod
    def forward(ctx: Any, rows_OI: Tensor, step: Tensor, layout: GroupLayout, bits: int) -> Tensor:
        ctx.save_for_backward(rows_OI, step)
        ctx.layout, ctx.bits = layout, bits
        half = 2 ** (bits - 1)
        step_OI = layout.expand(step)
        levels = torch.round(rows_OI.to(step.dtype) / step_OI).clamp_(-half, half - 1)
        return (levels * step_OI).to(rows_OI.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_OI, step = ctx.saved_tensors
        layout, half = ctx.layout, 2 ** (ctx.bits - 1)
        in_steps = rows_OI.to(step.dtype) / layout.expand(step)
        inside = (in_steps > -half) & (in_steps < half - 1)
        grad_step = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, in_steps.round() - in_steps, in_steps.clamp(-half, half - 1))
            scale = (layout.counts_on(step.device) * (half - 1)) ** -0.5
            grad_step = layout.sum(grad.to(step.dtype) * slope) * scale
        return grad * inside, grad_step, None, None


def learned_step(rows_OI: Tensor, step: Tensor, layout: GroupLayout, bits: int) -> Tensor:
    """Round to multiples of a step that receives a gradient, LSQ (arXiv:1902.08153).

    Forward ``clamp(round(w / s), -N, P) s`` with ``N = 2^(b-1)``, ``P = 2^(b-1) - 1``. Backward, for the weight: 1 where
    ``-N < w/s < P``, else 0; for the step: ``round(w/s) - w/s`` inside, -N and P at the ends, times ``1 / sqrt(n P)`` for the n weights
    of its group.

    Example:
        >>> learned_step(torch.tensor([[0.4, 0.6, 9.0]]), torch.tensor([[1.0]]), GroupLayout.of(1, 3, "channel"), 3)
        tensor([[0., 1., 3.]])
    """
    return _LearnedStep.apply(rows_OI, step, layout, bits)
