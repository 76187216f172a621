"""Uniform quantization-aware training: round in the forward, pass the gradient straight through (the baseline of all others)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupSize
from diffq_fx.methods.fixed import FixedBits, FixedBitsQuantizer
from diffq_fx.weights import WeightSpec


@dataclass(frozen=True, kw_only=True)
class STE(FixedBits):
    """Uniform quantization with a straight-through estimator: ``w + stop_gradient(Q(w) - w)``, Q on the range of the weights.

    Raises:
        ValueError: a setting is out of its range, with the value found.

    Example:
        >>> STE(bits=3, group_size=32).layout
        ('tensor', 32, 'affine')
        >>> STE(bits=17)
        Traceback (most recent call last):
        ...
        ValueError: STE: bits must be a whole number from 1 to 16, got 17.
    """

    grid: Grid = "affine"
    """"affine" (integer zero_point), "half" (half-integer ones, too), "symmetric", or "float" (float minimum, which ONNX cannot hold)."""

    scale_dtype: Literal["float32", "float16"] = "float32"
    """Type of scales, as for :class:`~diffq_fx.DiffQConfig`."""

    @property
    def scale_type(self) -> torch.dtype:
        """Of ``scale_dtype``."""
        return getattr(torch, self.scale_dtype)

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """One width for all, so that coding the widths costs nothing; scales as ``group_size`` says."""
        return "tensor", self.group_size, self.grid

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> FixedBitsQuantizer:
        """Make the rounding node of one weight."""
        return FixedBitsQuantizer(spec, self.bits, weight.device)
