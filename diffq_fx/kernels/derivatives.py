"""First derivatives in closed form have no second: one that is asked for is an error and not a silent zero."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffq_fx.errors import DiffQError


class _FirstAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise DiffQError(
            "A second derivative through the bits or the range of a weight was asked for; these have a first derivative alone. For second "
            "derivatives in the weights or the inputs, leave the parameters of model.compression out of what is differentiated twice."
        )


def first_alone(compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``compute(*tensors)`` within a backward, without autograd; its result cannot be differentiated again.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> first_alone(torch.exp, x).sum().backward()
        Traceback (most recent call last):
        ...
        diffq_fx.errors.DiffQError: A second derivative through the bits or the range of a weight was asked for; ...
    """
    return _FirstAlone.apply(compute, *tensors) if torch.is_grad_enabled() else compute(*tensors)
