"""Quant-Noise: each forward rounds a random part of the weights and leaves the others as they are (Fan, Stock et al., arXiv:2004.07320).

This is its scalar form; the noise of product quantization is a setting of
:class:`~diffq_fx.methods.product_quantization.ProductQuantization`.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.arguments import check_whole
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import GroupKind, GroupLayout, GroupSize, from_rows, to_rows
from diffq_fx.kernels import least_error_range
from diffq_fx.methods.base import count_forward, straight_through
from diffq_fx.methods.fixed import FixedBits, FixedBitsQuantizer, check_rate
from diffq_fx.weights import WeightSpec


@dataclass(frozen=True, kw_only=True)
class QuantNoise(FixedBits):
    """Scalar Quant-Noise: in each forward every block of weights is rounded with probability ``rate``; the others pass as they are.

    ``rate=1`` is uniform quantization-aware training (:class:`~diffq_fx.methods.STE`), ``rate=0`` trains in float. The weights
    themselves are never written.

    Raises:
        ValueError: a setting is out of its range, with the value found.

    Example:
        >>> QuantNoise(bits=4, rate=0.1, group_size="tensor", range="least_error").rate
        0.1
    """

    bits: int = 8
    rate: float = 0.5
    """Probability that a block is rounded in a forward; the paper has 0.5 for scalar quantization."""
    block_size: int = 1
    """Weights along the inputs that are rounded together or not at all; the paper has 1 for scalar quantization."""
    range: Literal["minmax", "least_error"] = "minmax"
    """"minmax" spans all weights of a group; "least_error" is the range with the smallest squared error, and clips what lies beyond."""
    range_every: int = 100
    """Forwards in training after which a "least_error" range is made anew; eval() and convert make their own."""
    grid: Literal["affine", "symmetric"] = "affine"
    """"affine" (integer zero_point) or "symmetric"."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the setting and the value."""
        super().__post_init__()
        check_rate("QuantNoise", self.rate)
        for name in ("block_size", "range_every"):
            check_whole("QuantNoise", name, getattr(self, name), 1)
        self.refuse_idle("range_every", 'range="least_error"', is_used=self.range == "least_error")

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, functional.Grid]:
        """One width for all, so that coding the widths costs nothing; scales as ``group_size`` says."""
        return "tensor", self.group_size, self.grid

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "QuantNoiseWeight":
        """Make the noise node of one weight."""
        return QuantNoiseWeight(spec, self, weight)


class QuantNoiseWeight(FixedBitsQuantizer):
    """Rounding of random blocks in training, of all weights in eval; the gradient of the weight is the identity.

    Buffers:
        held: float, (2, *shape of the spec's ``range_layout``): a "least_error" range, held for some forwards in training; else None.
    """

    held: Tensor | None

    def __init__(self, spec: WeightSpec, config: QuantNoise, weight: Tensor) -> None:
        super().__init__(spec, config.bits, weight.device)
        self.config = config
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        for name, shape in {"held": (2, *spec.range_layout.shape), "forwards": ()}.items():
            self.register_buffer(name, torch.zeros(shape, **like) if config.range == "least_error" else None)

    def range_of(self, rows_OI: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Range that the grid covers, two tensors of the spec's ``range_layout``."""
        if self.config.range == "least_error":
            return least_error_range(rows_OI, self.spec.range_layout, bits, self.spec.scale_layout, self.config.grid)
        return super().range_of(rows_OI, bits)

    @property
    def can_make_again(self) -> bool:
        """A range that is held for some forwards may be another one in the backward."""
        return self.config.range == "minmax"

    def state_tensors(self) -> tuple[Tensor, ...]:
        """The width: eval() finds its own range."""
        return (self.width,)

    def training_weight(self, weight: Tensor) -> Tensor:
        """The weight with random blocks rounded, straight-through."""
        source = weight.detach()
        rounded = self.round_to(source, self._training_params(source))
        noised = noised_blocks(self.spec, self.config.block_size, self.config.rate, weight.device)
        return straight_through(weight, torch.where(noised, rounded, source))

    def _training_params(self, weight: Tensor) -> QuantParams:
        """The grid in training: of this forward, or held for some forwards where finding the range is dear."""
        rows_OI, bits = to_rows(weight, self.spec.axis), self.rounded_bits()
        if self.held is None:
            return self.params(rows_OI, bits)
        ranges, scales = self.spec.range_layout, self.spec.scale_layout
        where = (ranges.kind, ranges.block, scales.kind, scales.block)
        _hold(rows_OI, bits, self.held, *self.counts, self.config.range_every, *where, self.config.grid)
        low, high = self.held
        return functional.quant_params(low, high, bits, self.config.grid)


@torch.library.custom_op("diffq_fx::hold_range", mutates_args=("held", "forwards", "saved"))
def _hold(
    rows_OI: Tensor,
    bits: Tensor,
    held: Tensor,
    forwards: Tensor,
    saved: Tensor,
    every: int,
    range_kind: str,
    range_block: int,
    scale_kind: str,
    scale_block: int,
    grid: str,
) -> None:
    """Find the range of least error once in so many forwards; one node of a compiled graph."""
    if count_forward(forwards, saved) % every == 0:
        rows, columns = rows_OI.shape
        ranges = GroupLayout(rows, columns, cast("GroupKind", range_kind), range_block)
        scales = GroupLayout(rows, columns, cast("GroupKind", scale_kind), scale_block)
        held.copy_(torch.stack(least_error_range(rows_OI, ranges, bits, scales, cast("functional.Grid", grid))))


@_hold.register_fake
def _(rows_OI, bits, held, forwards, saved, every, range_kind, range_block, scale_kind, scale_block, grid) -> None:  # noqa: ANN001
    pass


def noised_blocks(spec: WeightSpec, block_size: int, rate: float, device: torch.device) -> Tensor:
    """Draw which weights are noised, bool: blocks along the inputs of a row, the last one may be shorter, each with probability ``rate``.

    Example:
        >>> spec = WeightSpec(name="w", shape=(4, 6), axis=0)
        >>> int(noised_blocks(spec, 3, 1.0, torch.device("cpu")).sum()), int(noised_blocks(spec, 3, 0.0, torch.device("cpu")).sum())
        (24, 0)
    """
    layout = GroupLayout.of(spec.rows, spec.columns, block_size)
    noised_RC = torch.rand(layout.shape, device=device) < rate
    return from_rows(layout.expand(noised_RC).expand(spec.rows, spec.columns), spec.shape, spec.axis)
