"""The noise of given steps, differentiable in weight and steps: the part of the kernels that needs no bits; tests use it too."""

from typing import Any

import torch
from torch import Tensor

from diffq_fx.kernels import noise


class _NoiseOfSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, *settings: Any) -> Tensor:
        seed = noise.draw_seed(weight.device)
        ctx.save_for_backward(seed, step)
        ctx.settings = settings
        return noise.add(weight, step, seed, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, noise.reduce(grad.contiguous(), *ctx.saved_tensors, *ctx.settings), None, None, None


def add_noise(weight: Tensor, step: Tensor, *, axis: int, block: int, gaussian: bool = False) -> Tensor:
    """``w + step * n``."""
    return _NoiseOfSteps.apply(weight, step, axis, block, gaussian)
