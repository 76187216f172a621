"""Rounding on a uniform grid: what DiffQ and its integer baselines have in common once training is over."""

from abc import abstractmethod

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.footprint import Footprint, grid_footprint
from diffq_fx.functional import QuantParams
from diffq_fx.groups import from_rows, to_rows
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.noise import native
from diffq_fx.storage import IntegerWeight


class GridQuantizer(WeightQuantizer):
    """A quantizer whose rounded weight is ``(levels - zero_point) * scale`` on the spec's grid and groups."""

    @abstractmethod
    def rounded_bits(self) -> Tensor:
        """The width of each group after rounding, int32, shape of the spec's ``bits_layout``."""

    def range_of(self, rows_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Range that the grid covers, two tensors of the spec's ``range_layout``."""
        return functional.weight_range(rows_OI, self.spec.range_layout, self.spec.grid)

    def params(self, rows_OI: Tensor, bits: Tensor) -> QuantParams:
        """Scale and zero point of the grid, shape of the spec's ``scale_layout``."""
        low, high = self.range_of(rows_OI)
        return functional.quant_params(low, high, bits, self.spec.grid)

    def _levels(self, rows_OI: Tensor, params: QuantParams, bits: Tensor) -> Tensor:
        return functional.quantize(rows_OI.to(params.scale.dtype), params, bits, self.spec.scale_layout)

    def round_to(self, weight: Tensor, params: QuantParams) -> Tensor:
        """The nearest weight on the grid of ``params``."""
        bits = self.rounded_bits()
        if params.zero_point is not None and not native.recorded() and native.takes(weight, self.spec.axis):
            top = 2 ** bits.to(torch.int32) - 1
            return native.round_to_grid(weight.detach(), params.scale, params.zero_point, top, self.spec.scale_layout)
        rows_OI = to_rows(weight, self.spec.axis)
        levels_OI = self._levels(rows_OI, params, bits)
        rounded_OI = functional.dequantize(levels_OI, params, self.spec.scale_layout).to(weight.dtype)
        return from_rows(rounded_OI, self.spec.shape, self.spec.axis).contiguous()

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The nearest weight on the grid."""
        return self.round_to(weight, self.params(to_rows(weight, self.spec.axis), self.rounded_bits()))

    def store(self, weight: Tensor) -> IntegerWeight:
        """The levels, their scale and zero point."""
        bits, rows_OI = self.rounded_bits(), to_rows(weight, self.spec.axis)
        params = self.params(rows_OI, bits)
        return IntegerWeight(self.spec, self._levels(rows_OI, params, bits), params, bits)

    def footprint(self) -> Footprint:
        """The parts of the weight's sizes once it is rounded."""
        return grid_footprint(self.spec, self.rounded_bits())
