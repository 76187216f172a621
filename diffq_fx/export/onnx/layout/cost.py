"""What a linear layer costs in onnxruntime, in microseconds: a model of measured times, which chooses between the rules.

Fitted (non-negative least squares on relative errors, half of the predictions within 15 %) to the medians of 225 shapes, K and N
from 8 to 2048 and 1 to 1024 rows, at 2, 4 and 8 bits and blocks of 16 to 256: onnxruntime 1.31 with its default accuracy_level
(int8 activations inside MatMulNBits), one thread of an x86-64 with AVX-512 VNNI. Only the *ratio* of two predictions is used. What it says:

- a fused layer wins where the weights do not fit the cache (0.2 of the float time at 1 row of 2048 x 2048) and from about
  K = 512 on at any number of rows (0.6 to 0.9);
- it loses on small layers and many rows: every row is quantized anew, and the cost per output is that of 100 weights;
- long blocks are faster: 32 weights per scale (onnxruntime's choice for a per-channel scale) costs up to twice 256;
- the 8-bit kernel is as fast as the 4-bit one or faster from about 4 rows on, the 2-bit one is slower than both.

The dynamic product (DynamicQuantizeMatMul) is a fit of the same kind to 216 shapes, K and N from 32 to 2048 and 1 to 512 rows: it is
chosen for 163 of them, of which 5 are more than 3 % slower than float (12 % at most), and takes 0.13 to 0.3 of the float time from
about 384 x 384 on at any number of rows.

Shape legend: M rows (the product of the activation's leading sizes), K inputs, N output channels.
"""

import math
from typing import NamedTuple

_FUSE_BELOW = 0.9
"""A layer is fused if it is predicted to take less than this part of the float time: at this margin the model fuses 498 of the
measured layers, of which 4 are more than 3 % slower than float (18 % at most)."""
_BUSY = 32
"""So many times the example's rows must not be ..."""
_BUSY_BELOW = 1.25
"""... slower than this part of the float time: an example batch of one says little about the batches to come."""

_CACHED_WEIGHTS = 400e3
"""Weights that stay in the cache between two runs."""


class _Cost(NamedTuple):
    call: float
    """us a call."""
    weight: float
    """ns a weight, whatever the number of rows."""
    distant_weight: float
    """ns a weight that does not fit the cache."""
    activation: float
    """ns an input value: quantizing it."""
    output: float
    """ns an output value."""
    product: float
    """ps a product."""
    scale: float = 0.0
    """ns a scale, whatever the number of rows."""
    scaled_product: float = 0.0
    """ps a scale and row."""


_FLOAT = _Cost(5.83, 0.0484, 0.111, 0.0108, 0.279, 10.5)
_FUSED = {
    2: _Cost(6.33, 0.0, 0.011, 0.449, 4.66, 0.168, 0.792, 827.0),
    4: _Cost(6.53, 0.0, 0.0181, 0.383, 2.25, 6.84, 0.373, 119.0),
    8: _Cost(6.32, 0.00936, 0.0331, 0.353, 1.71, 6.15, 0.475, 111.0),
}
_DYNAMIC = _Cost(7.45, 0.0038, 0.03, 0.26, 0.324, 1.12, 5.21)
"""Its scales are one per output."""


class Times(NamedTuple):
    """Predicted times of a layer, in us."""

    rows: int
    example: float
    """At the example's number of rows."""
    busy: float
    """At 32 times as many."""

    @property
    def typical(self) -> float:
        """The geometric mean of both, by which ways to fuse are compared."""
        return math.sqrt(self.example * self.busy)

    def why_not_instead_of(self, in_float: "Times") -> str | None:
        """Why a layer with these times should rather be a float one; None where it should not.

        Args:
            in_float: the times of the float MatMul.
        """
        if self.example >= _FUSE_BELOW * in_float.example:
            return f"fused {self.example:.3g} us, float {in_float.example:.3g} us predicted for {self.rows} rows"
        if self.busy >= _BUSY_BELOW * in_float.busy:
            return f"fused {self.busy:.3g} us, float {in_float.busy:.3g} us predicted for {_BUSY * self.rows} rows"
        return None


NO_TIME = Times(1, 0.0, 0.0)


def float_times(rows: int, inputs: int, outputs: int) -> Times:
    """Predict a float MatMul.

    Args:
        rows: M in the example.
        inputs: K.
        outputs: N.

    Example:
        >>> round(float_times(1, 64, 64).example)
        6
    """
    return Times(rows, *(_microseconds(_FLOAT, many, inputs, outputs, 0) for many in (rows, _BUSY * rows)))


def fused_times(bits: int, rows: int, inputs: int, outputs: int, block: int) -> Times:
    """Predict onnxruntime's MatMulNBits.

    Args:
        bits: the width that the kernel computes with: 2, 4 or 8.
        rows: M in the example.
        inputs: K; a last block that is not full costs as much as a full one.
        outputs: N.
        block: inputs that share a scale.

    Example:
        >>> fused_times(8, 1, 2048, 2048, 256).example < 0.5 * float_times(1, 2048, 2048).example
        True
    """
    blocks = -(-inputs // block)
    cost = _FUSED[bits]
    return Times(rows, *(_microseconds(cost, many, blocks * block, outputs, blocks * outputs) for many in (rows, _BUSY * rows)))


def dynamic_times(rows: int, inputs: int, outputs: int) -> Times:
    """Predict onnxruntime's DynamicQuantizeMatMul: int8 weights, activations rounded to uint8 at every run.

    Args:
        rows: M in the example.
        inputs: K.
        outputs: N.

    Example:
        >>> dynamic_times(32, 384, 1536).example < 0.4 * float_times(32, 384, 1536).example
        True
    """
    return Times(rows, *(_microseconds(_DYNAMIC, many, inputs, outputs, outputs) for many in (rows, _BUSY * rows)))


def _microseconds(cost: _Cost, rows: int, inputs: int, outputs: int, scales: int) -> float:
    weights = inputs * outputs
    return (
        cost.call
        + 1e-3 * (cost.weight * weights + cost.distant_weight * max(0.0, weights - _CACHED_WEIGHTS))
        + 1e-3 * rows * (cost.activation * inputs + cost.output * outputs)
        + 1e-6 * rows * cost.product * weights
        + 1e-3 * scales * (cost.scale + 1e-3 * rows * cost.scaled_product)
    )
