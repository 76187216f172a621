"""The maths of quantization, and nothing else: bits from logits, ranges, steps, levels and back.

Everything here works on rows and groups (see :mod:`diffq_fx.functional.groups`); no modules, no graphs, no state.

Shape legend: O rows (output channels), I columns, R x C grid of groups; (R, C) values broadcast together.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffq_fx.functional.groups import GroupLayout, rows_of

Grid = Literal["affine", "half", "symmetric", "float"]
"""affine: integer zero_point; half: one that may lie half-way between two levels, up to :data:`WIDEST_HALF` bits; symmetric: zero_point in
the middle; float: the paper's float offset (no ONNX form)."""
AROUND_ZERO = ("affine", "half")
"""Grids whose zero point is chosen by the weights, and whose range has to hold zero."""
WIDEST_HALF = 2
"""Bits up to which a zero point of the "half" grid may be a half-integer. It takes 37 % off the squared error of normal weights at 1 bit
and 18 % at 2 (benchmarks/squared_error.py). At 3 bits it would be 5 %, and a decoder without training is ruined where zero is no level."""


class QuantParams(NamedTuple):
    """Scale and zero point per group; on the paper's float grid ``offset`` is used and ``zero_point`` is empty.

    A zero point is int32, on the "half" grid float32.
    """

    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "QuantParams":
        """A change of each that is there."""
        scale, *others = self
        return QuantParams(change(scale), *(None if each is None else change(each) for each in others))

    def widened(self) -> "QuantParams":
        """The same values in types to compute with: those of 16 bits in float32."""
        return self.map(lambda values: values.float() if values.dtype in (torch.float16, torch.bfloat16) else values)

    def of_rows(self, rows: slice) -> "QuantParams":
        """Those of some of the rows."""
        return self.map(lambda values: rows_of(values, rows))

    def known_zero_point(self) -> Tensor:
        """The zero point, which the float grid has not."""
        if self.zero_point is None:
            raise ValueError("a float grid has an offset and no zero_point.")
        return self.zero_point


def bits_from_logits(logits: Tensor, min_bits: float | Tensor, max_bits: float | Tensor, gain: float = 1.0) -> Tensor:
    """Number of bits of each group: ``b = b_min + sigmoid(gain * l) (b_max - b_min)``, DiffQ (arXiv:2104.09987).

    Bits as float, of trainable logits of any shape. ``gain`` is how much faster than the logit its sigmoid's argument moves (paper: 1).

    Example:
        >>> bits_from_logits(torch.zeros(2), 2, 8)
        tensor([5., 5.])
    """
    return min_bits + torch.sigmoid(logits * gain) * (max_bits - min_bits)


def logits_from_bits(bits: Tensor, min_bits: float, max_bits: float, gain: float = 1.0) -> Tensor:
    """Inverse of :func:`bits_from_logits`, kept finite where ``bits`` sits on a limit.

    Example:
        >>> logits_from_bits(torch.tensor([5.0]), 2, 8)
        tensor([0.])
    """
    share = ((bits - min_bits) / (max_bits - min_bits)).clamp(0.01, 0.99)
    return torch.logit(share) / gain


def grid_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Range ``(low, high)`` that the grid has to cover for weights from ``low`` to ``high``, in float32 or better.

    Zero is within the range of every grid but the float one; the symmetric one mirrors the end that is further from zero.

    Example:
        >>> grid_range(torch.tensor([1.0]), torch.tensor([3.0]), "symmetric")
        (tensor([-3.]), tensor([3.]))
    """
    if low.dtype in (torch.float16, torch.bfloat16):
        low, high = low.float(), high.float()
    if grid in AROUND_ZERO:
        return low.clamp(max=0), high.clamp(min=0)
    if grid == "symmetric":
        largest = torch.maximum(low.abs(), high.abs())
        return -largest, largest
    return low, high


def step_size(low: Tensor, high: Tensor, bits: Tensor) -> Tensor:
    """Distance between neighbouring levels: ``step = (high - low) / (2^b - 1)``, DiffQ (arXiv:2104.09987).

    Differentiable in ``bits``, which may be fractional. A group of one value has step 0 and so no noise.

    Example:
        >>> step_size(torch.tensor(-1.0), torch.tensor(2.0), torch.tensor(2.0))
        tensor(1.)
    """
    return (high - low) / (torch.exp2(bits) - 1)


@torch.library.custom_op("diffq_fx::half_values", mutates_args=())
def half_values(values: Tensor) -> Tensor:
    """The nearest values of float16, in the type of ``values``; opaque to compilers, which leave out a cast that another one undoes.

    Example:
        >>> half_values(torch.tensor([0.1, 1e6]))
        tensor([1.0000e-01, 6.5504e+04])
    """
    most = torch.finfo(torch.float16).max
    return values.clamp(-most, most).half().to(values.dtype)


@half_values.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def quant_params(low: Tensor, high: Tensor, bits: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> QuantParams:
    """Scale and zero point of a grid of ``2^b`` levels over ``[low, high]``.

    ``scale = (high - low) / (2^b - 1)``, ``zero_point = round(-low / scale)``, which keeps every weight of the range
    within ``scale / 2`` of a level; on the "half" grid up to :data:`WIDEST_HALF` bits it is the nearest multiple of 1/2. A range of length
    zero gets scale 1: its one value is a level. ``bits`` are whole numbers from 1 to 16. The scale is float32 or better, the zero_point
    int32 ("half": float32) in ``[0, 2^b - 1]``; the "float" grid has a float offset. With a ``scale_dtype`` of float16 the values of scale
    and offset are the nearest that float16 has, and the zero_point is that of this scale.

    Example:
        >>> params = quant_params(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), torch.tensor([[2]]), "affine")
        >>> params.scale.item(), params.zero_point.item()
        (1.0, 1)
    """
    scale = step_size(low, high, bits.to(low.dtype))
    if scale_dtype == torch.float16:
        scale, low = half_values(scale), half_values(low)
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    if grid == "float":
        return QuantParams(scale, None, low.expand_as(scale).contiguous())
    bits = bits.to(torch.int32)
    if grid == "symmetric":
        return QuantParams(scale, (2 ** (bits - 1)).expand_as(scale).contiguous(), None)
    exact = 0 - low / scale  # never -0.0
    zero_point = torch.round(exact)
    if grid == "half":
        zero_point = torch.where(bits <= WIDEST_HALF, torch.round(2 * exact) / 2, zero_point)
    dtype = torch.float32 if grid == "half" else torch.int32
    zero_point = torch.minimum(zero_point.clamp(min=0).to(dtype), 2**bits - 1)
    return QuantParams(scale, zero_point.contiguous(), None)


def quantize(rows_OI: Tensor, params: QuantParams, bits: Tensor, layout: GroupLayout) -> Tensor:
    """Nearest level of each weight, int32: ``q = clamp(round(w / scale) + zero_point, 0, 2^b - 1)``; ``layout`` is that of the scale.

    Where the zero point is a half-integer z, ``round(w / scale + 1/2) + z - 1/2``.

    Example:
        >>> layout = GroupLayout.of(1, 3, "channel")
        >>> params = quant_params(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), torch.tensor([[2]]), "affine")
        >>> quantize(torch.tensor([[-1.0, 0.4, 2.0]]), params, torch.tensor([[2]]), layout)
        tensor([[0, 1, 3]], dtype=torch.int32)
    """
    scale = layout.expand(params.scale)
    if params.offset is not None:
        levels = torch.round((rows_OI - layout.expand(params.offset)) / scale)
    else:
        zero_point, in_steps = params.known_zero_point(), rows_OI / scale
        if zero_point.is_floating_point():
            half = zero_point.frac()
            zero_point, in_steps = zero_point - half, in_steps + layout.expand(half)
        levels = torch.round(in_steps) + layout.expand(zero_point)
    top = layout.expand((2 ** bits.to(torch.int32) - 1).expand_as(params.scale))
    return torch.minimum(levels.clamp_(min=0), top).to(torch.int32)


def dequantize(levels_OI: Tensor, params: QuantParams, layout: GroupLayout) -> Tensor:
    """Weights of the levels: ``w = (q - zero_point) * scale``, as ONNX's DequantizeLinear computes it.

    On the paper's float grid ``w = q * scale + offset``. The weights have the dtype of ``params.scale``, float32 where that has 16 bits;
    ``layout`` is its layout.

    Example:
        >>> params = QuantParams(torch.tensor([[0.5]]), torch.tensor([[1]]), None)
        >>> dequantize(torch.tensor([[0, 3]]), params, GroupLayout.of(1, 2, "channel"))
        tensor([[-0.5000,  1.0000]])
    """
    params = params.widened()
    scale = layout.expand(params.scale)
    if params.offset is not None:
        return levels_OI * scale + layout.expand(params.offset)
    return (levels_OI - layout.expand(params.known_zero_point())).to(scale.dtype) * scale
