"""From the trainable logits of the bits to the steps of the grid and to the size of the model, in few passes over memory."""

import math

import torch
from torch import Tensor

from diffq_fx.functional.groups import largest_in, rows_of, tiles
from diffq_fx.functional.precision import widened, widest_float
from diffq_fx.kernels import memory, native


def step_of_logits(logits: Tensor, span: Tensor, bits: tuple[float, float, float]) -> Tensor:
    """Step of each group from its trainable logit, ``span / (2^b - 1)``, ``b = b_min + sigmoid(gain l) (b_max - b_min)``; without autograd.

    The same as :func:`diffq_fx.functional.bits_from_logits` and :func:`diffq_fx.functional.step_size` after each other, in fewer passes.
    ``logits`` of shape (R, C) and ``span``, the length of each range, broadcast with each other; ``bits`` are b_min, b_max and the gain.

    Example:
        >>> step_of_logits(torch.zeros(1, 1), torch.ones(1, 1), (1, 3, 1))
        tensor([[0.3333]])
    """
    min_bits, max_bits, gain = bits
    shape = torch.Size(map(max, logits.shape, span.shape))  # torch.broadcast_shapes takes longer than all the rest of a small weight
    step = memory.empty(shape, torch.promote_types(logits.dtype, span.dtype), logits.device)
    for rows in tiles(shape, logits.device):
        share = torch.sigmoid_(rows_of(logits, rows) * gain)
        levels = share.mul_(max_bits - min_bits).add_(min_bits).exp2_()
        step[rows] = rows_of(span, rows) / levels.sub_(1)
    return step


def slope_of_step(
    grad: Tensor, logits: Tensor, span: Tensor, step: Tensor, *, growth: Tensor | None, bits: tuple[float, float, float]
) -> Tensor:
    """``grad`` times ``d step / d l = -ln 2 step levels / (levels - 1) db/dl``, where ``levels / (levels - 1) = 1 + step / span``.

    The widest bits of each range lengthen all of its steps: ``ln 2 step growth db/dl``.
    """
    min_bits, max_bits, gain = bits
    factor = -gain * (max_bits - min_bits) * math.log(2)
    grown = None if growth is None else _of_widest((grad * step).sum_to_size(span.shape) * growth, logits)
    inverse = torch.where(span > 0, span, 1).reciprocal_()
    if logits.shape != step.shape:  # logits that several ranges share, so there are few of them
        grad = (grad * step).addcmul_(grad * step, step * inverse).sum_to_size(logits.shape)
    grad_logits, one = torch.empty_like(logits), step.new_ones(())
    for rows in tiles(logits.shape, logits.device):
        into = grad[rows]
        if logits.shape == step.shape:
            into = torch.addcmul(one, step[rows], rows_of(inverse, rows)).mul_(into).mul_(step[rows])
        share = torch.sigmoid_(logits[rows] * gain)
        into = into if grown is None else into - grown[rows]
        torch.mul(torch.ops.aten.sigmoid_backward(into.to(share.dtype), share), factor, out=grad_logits[rows])
    return grad_logits


def _of_widest(per_range: Tensor, logits: Tensor) -> Tensor:
    """What belongs to each range, given to the logits that are largest in it: each of several gets its share."""
    shape = [min(sizes) for sizes in zip(per_range.shape, logits.shape, strict=True)]
    are_widest = (logits == largest_in(logits, shape)).to(per_range.dtype)
    return are_widest * (per_range.sum_to_size(shape) / are_widest.sum_to_size(shape).clamp(min=1))


def size_of_logits(
    values: Tensor, logits: Tensor, *, min_bits: float, max_bits: float, gain: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Size ``sum_s n_s b_s`` of groups with these logits, and what else one look at them tells; without autograd.

    Of the values that are stored in each group and the logits, both of shape (N,), it makes the size, how fast it grows when all logits
    grow together, the smallest and the largest logit: 0-d, float64 where the device has it.

    Example:
        >>> [each.item() for each in size_of_logits(torch.ones(2), torch.zeros(2), min_bits=2, max_bits=8, gain=1)]
        [10.0, 3.0, 0.0, 0.0]
    """
    if native.takes_size(values, logits):
        return native.size(values, logits, min_bits, max_bits, gain)
    # sum n b = b_min sum n + (b_max - b_min) sum n s, and sum n db/dl = gain (b_max - b_min) (sum n s - sum n s^2), with s the sigmoid
    total, first, second = (torch.zeros((), dtype=widest_float(logits.device), device=logits.device) for _ in range(3))
    for tile in tiles(logits.shape, logits.device):
        share, count = torch.sigmoid_(logits[tile] * gain), values[tile]
        taken = count * share
        total += count.sum(dtype=total.dtype)
        first += taken.sum(dtype=total.dtype)
        second += taken.mul_(share).sum(dtype=total.dtype)
    low, high = torch.aminmax(logits)
    return min_bits * total + (max_bits - min_bits) * first, gain * (max_bits - min_bits) * (first - second), widened(low), widened(high)


def slope_of_size(values: Tensor, logits: Tensor, *, min_bits: float, max_bits: float, gain: float, times: Tensor | None = None) -> Tensor:
    """Derivative of ``sum_s n_s b_s`` in each logit, ``times`` a 0-d tensor, shape (N,); without autograd. See :func:`size_of_logits`.

    Example:
        >>> slope_of_size(torch.ones(2), torch.zeros(2), min_bits=2, max_bits=8, gain=1)
        tensor([1.5000, 1.5000])
    """
    if native.takes_size(values, logits):
        return native.slope_of_size(values, logits, 1.0 if times is None else float(times), min_bits, max_bits, gain)
    slopes = memory.empty(logits.shape, logits.dtype, logits.device)
    factor = gain * (max_bits - min_bits) * (1.0 if times is None else times)
    for tile in tiles(logits.shape, logits.device):
        share = torch.sigmoid_(logits[tile] * gain)
        torch.mul(torch.ops.aten.sigmoid_backward(values[tile].to(share.dtype), share), factor, out=slopes[tile])
    return slopes


def moments(grad: Tensor, slope: Tensor) -> Tensor:
    """The sums of g, n, g^2, g n and n^2 over two rows g and n, shape (5,), float64 where the device has it.

    Example:
        >>> moments(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).tolist()
        [3.0, 7.0, 5.0, 11.0, 25.0]
    """
    if grad.shape == slope.shape and native.takes_logits(grad, slope):
        return native.moments(grad, slope)
    g, n = widened(grad), widened(slope)
    return torch.stack([g.sum(), n.sum(), torch.dot(g, g), torch.dot(g, n), torch.dot(n, n)])
