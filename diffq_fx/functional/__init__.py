"""The maths of quantization, and nothing else: grids, groups, ranges, codebooks. No modules, no graphs, no state."""

from diffq_fx.functional.quantization import (
    AROUND_ZERO,
    WIDEST_HALF,
    Grid,
    QuantParams,
    bits_from_logits,
    dequantize,
    grid_range,
    logits_from_bits,
    quant_params,
    quantize,
    step_size,
)

__all__ = [
    "AROUND_ZERO",
    "WIDEST_HALF",
    "Grid",
    "QuantParams",
    "bits_from_logits",
    "dequantize",
    "grid_range",
    "logits_from_bits",
    "quant_params",
    "quantize",
    "step_size",
]
