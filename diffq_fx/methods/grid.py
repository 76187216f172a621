"""Rounding on a uniform grid: what DiffQ and its integer baselines have in common once training is over."""

from torch import Tensor

from diffq_fx import functional
from diffq_fx.functional import QuantParams
from diffq_fx.groups import from_rows, to_rows
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.storage import IntegerWeight


class GridQuantizer(WeightQuantizer):
    """A quantizer whose rounded weight is ``(levels - zero_point) * scale`` on the spec's grid and groups."""

    def range_of(self, rows_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Range that the grid covers, two tensors of the spec's ``range_layout``."""
        return functional.weight_range(rows_OI, self.spec.range_layout, self.spec.grid)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, QuantParams, Tensor]:
        bits = self.rounded_bits()
        rows_OI = to_rows(weight, self.spec.axis)
        low, high = self.range_of(rows_OI)
        params = functional.quant_params(low, high, bits, self.spec.grid)
        return functional.quantize(rows_OI.to(low.dtype), params, bits, self.spec.scale_layout), params, bits

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The nearest weight on the grid."""
        levels_OI, params, _ = self._quantize(weight)
        rows_OI = functional.dequantize(levels_OI, params, self.spec.scale_layout).to(weight.dtype)
        return from_rows(rows_OI, self.spec.shape, self.spec.axis).contiguous()

    def store(self, weight: Tensor) -> IntegerWeight:
        """The levels, their scale and zero point."""
        return IntegerWeight(self.spec, *self._quantize(weight))
