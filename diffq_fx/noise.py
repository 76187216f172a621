"""Pseudo quantization noise as one operator: draw, add, and in the backward one grouped reduction.

``w + step * n`` with n independent of w, DiffQ (arXiv:2104.09987). One byte of randomness per weight is drawn and kept: 256 equally
likely values centred on zero have mean 0 and variance 1/12 to within 2e-5. The seed of each draw comes from torch's
default CPU generator, so ``torch.manual_seed`` repeats a run and activation checkpointing recomputes the same noise; the
rank is mixed in, so that data-parallel ranks that were seeded alike still draw different noise.

Differs from the paper: the range is a constant of the step, so the gradient of the weight is the identity.
"""

import math

import torch
from torch import Tensor

from diffq_fx.groups import GroupLayout, from_rows, to_rows
from diffq_fx.storage import scale_layout_of

GAUSSIAN_STD = 0.5
"""The paper's Gaussian noise is ``(step / 2) N(0, 1)``; uniform noise, ``(step / 2) U[-1, 1]``, has std 1/sqrt(12)."""

_SEED_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, from the golden ratio: consecutive ranks land far apart


def _seeded_generator(device: torch.device) -> torch.Generator:
    seed = int(torch.randint(2**62, (1,)))
    distributed = torch.distributed
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return torch.Generator(device).manual_seed((seed + rank * _SEED_MULTIPLIER) % 2**63)


def draw_uniform_bytes(numel: int, device: torch.device) -> Tensor:
    """Draw ``numel`` independent int8, uniform over -128 to 127: noise ``(byte + 0.5) / 256`` is centred in (-0.5, 0.5)."""
    words = torch.empty(-(-numel // 8), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=_seeded_generator(device))
    return words.view(torch.int8)[:numel]


def draw_gaussian(numel: int, device: torch.device) -> Tensor:
    """Draw ``numel`` independent normal values of std :data:`GAUSSIAN_STD`, float32."""
    noise = torch.empty(numel, dtype=torch.float32, device=device)
    return noise.normal_(0, GAUSSIAN_STD, generator=_seeded_generator(device))


def _in_steps(noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise as stored (bytes or floats) to noise in steps."""
    if noise.dtype == torch.int8:
        return noise.to(dtype).add_(0.5).div_(256)
    return noise.to(dtype)


def _layout(shape: torch.Size, step: Tensor, axis: int, block: int) -> GroupLayout:
    rows = shape[axis]
    return scale_layout_of(step, rows, math.prod(shape) // rows, block)


@torch.library.custom_op("diffq_fx::add_noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def add_noise_op(weight: Tensor, step: Tensor, axis: int, block: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Noisy weight, and the noise that was drawn (int8 when uniform), in the order of the weight's rows."""
    draw = draw_gaussian if gaussian else draw_uniform_bytes
    noise = draw(weight.numel(), weight.device)
    layout = _layout(weight.shape, step, axis, block)
    rows_OI = to_rows(weight, axis).to(torch.promote_types(weight.dtype, torch.float32))
    in_steps = _in_steps(noise, rows_OI.dtype).reshape(rows_OI.shape)
    noisy = torch.addcmul(rows_OI, in_steps, layout.expand(step).to(rows_OI.dtype))
    return from_rows(noisy.to(weight.dtype), tuple(weight.shape), axis).contiguous(), noise


@add_noise_op.register_fake
def _(weight, step, axis, block, gaussian):  # noqa: ANN001, ANN202
    noise = weight.new_empty(weight.numel(), dtype=torch.float32 if gaussian else torch.int8)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), noise


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    _, step, ctx.axis, ctx.block, _ = inputs
    ctx.save_for_backward(output[1], step)


def _backward(ctx, grad: Tensor, _: Tensor):  # noqa: ANN001, ANN202
    noise, step = ctx.saved_tensors
    grad_step = torch.ops.diffq_fx.reduce_noise(grad, noise, step, ctx.axis, ctx.block) if ctx.needs_input_grad[1] else None
    return grad, grad_step, None, None, None


@torch.library.custom_op("diffq_fx::reduce_noise", mutates_args=())
def reduce_noise_op(grad: Tensor, noise: Tensor, step: Tensor, axis: int, block: int) -> Tensor:
    """Gradient of the step: the sum over each group of ``grad * noise``."""
    grad_OI = to_rows(grad, axis).to(step.dtype)
    product = _in_steps(noise, step.dtype).reshape(grad_OI.shape) * grad_OI
    return _layout(grad.shape, step, axis, block).sum(product)


@reduce_noise_op.register_fake
def _(grad, noise, step, axis, block):  # noqa: ANN001, ANN202
    return torch.empty_like(step)


torch.library.register_autograd("diffq_fx::add_noise", _backward, setup_context=_setup_context)


def add_noise(weight: Tensor, step: Tensor, *, axis: int, block: int, gaussian: bool = False) -> Tensor:
    """Add pseudo quantization noise: ``w + step * n``, DiffQ (arXiv:2104.09987).

    Args:
        weight: float, any shape.
        step: shape (R, C) of a :class:`~diffq_fx.groups.GroupLayout` of the weight; its gradient is ``sum(grad * n)`` per group.
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
    return torch.ops.diffq_fx.add_noise(weight, step, axis, block, gaussian)[0]
