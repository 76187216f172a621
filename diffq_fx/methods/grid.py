"""Rounding on a uniform grid: what DiffQ and its integer baselines have in common once training is over."""

from abc import abstractmethod

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import rows_of, to_rows
from diffq_fx.kernels import extremes, round_to_grid
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.storage import IntegerWeight
from diffq_fx.storage.footprint import Footprint, grid_footprint


class GridQuantizer(WeightQuantizer):
    """A quantizer whose rounded weight is ``(levels - zero_point) * scale`` on the spec's grid and groups."""

    @abstractmethod
    def rounded_bits(self) -> Tensor:
        """The width of each group after rounding, int32, shape of the spec's ``bits_layout``."""

    def range_of(self, rows_OI: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Range that the grid covers with groups of these widths, two tensors of the spec's ``range_layout``."""
        return functional.grid_range(*extremes(rows_OI, self.spec.range_layout), self.spec.grid)

    def params(self, rows_OI: Tensor, bits: Tensor) -> QuantParams:
        """Scale and zero point of the grid, shape of the spec's ``scale_layout``."""
        low, high = self.range_of(rows_OI, bits)
        return functional.quant_params(low, high, bits, self.spec.grid, self.spec.scale_dtype)

    def round_to(self, weight: Tensor, params: QuantParams) -> Tensor:
        """The nearest weight on the grid of ``params``."""
        return round_to_grid(weight, params, self.rounded_bits(), self.spec.axis, self.spec.scale_layout)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The nearest weight on the grid."""
        return self.round_to(weight, self.params(to_rows(weight, self.spec.axis), self.rounded_bits()))

    def store(self, weight: Tensor) -> IntegerWeight:
        """The levels, their scale and zero point."""
        bits, rows_OI, layout = self.rounded_bits(), to_rows(weight, self.spec.axis), self.spec.scale_layout
        params = self.params(rows_OI, bits)
        levels_OI = torch.empty(rows_OI.shape, dtype=torch.uint8 if int(bits.max()) <= 8 else torch.int32, device=weight.device)
        for part in layout.row_slices(weight.device):  # piece by piece: no other integers as large as the weight
            rows_PI = rows_OI[part].to(params.scale.dtype)
            levels_PI = functional.quantize(rows_PI, params.of_rows(part), rows_of(bits, part), layout.of_rows(part))
            levels_OI[part] = levels_PI.to(levels_OI.dtype)
        return IntegerWeight(self.spec, levels_OI, params, bits)

    def footprint(self) -> Footprint:
        """The parts of the weight's sizes once it is rounded."""
        return grid_footprint(self.spec, self.rounded_bits())
