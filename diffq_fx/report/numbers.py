"""The numbers of a report: frozen facts about the bits of one model, and the sums over them.

Sizes are kept as whole numbers of bits, so that sums are exact; what is shown is in MiB, and says so.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffq_fx.budget.size import mib
from diffq_fx.storage.footprint import Footprint
from diffq_fx.weights import SkippedWeight

Stage = Literal["prepared", "converted"]


@dataclass(frozen=True, kw_only=True)
class WeightBits(Footprint):
    """One quantized weight: its widths and what it takes in each of the three sizes."""

    name: str
    """The weight's name in the float model's state_dict."""
    aliases: tuple[str, ...] = ()
    """The other names of a tied weight, which is counted once."""
    shape: tuple[int, ...]
    consumer: str
    """What reads it: "linear", "conv2d", "LSTM"."""
    float_bits: int
    """The weight before it was quantized, in its own dtype."""
    sensitivity: float | None = None
    """Bits that the first steps of training showed it to need, but for a constant that all weights share; None where not known."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def overhead_bits(self) -> int:
        """What is stored beside the bit-packed levels: scales, zero points and coded widths."""
        return self.scale_bits + self.coding_bits

    @property
    def average_bits(self) -> float:
        """Mean number of bits of a weight: widths over the weights (not over the groups), or its share of a code."""
        return self.payload_bits / self.numel

    @property
    def min_bits(self) -> int:
        """Smallest width."""
        return min(self.histogram)

    @property
    def max_bits(self) -> int:
        """Largest width."""
        return max(self.histogram)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; sizes in MiB, the keys of the histogram as text."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "shape": list(self.shape),
            "consumer": self.consumer,
            "grid": self.grid,
            "weights": self.numel,
            "average_bits": self.average_bits,
            "min_bits": self.min_bits,
            "max_bits": self.max_bits,
            "histogram": {str(width): count for width, count in self.histogram.items()},
            "payload_mib": mib(self.payload_bits),
            "overhead_mib": mib(self.overhead_bits),
            "overhead_scale_mib": mib(self.scale_bits),
            "overhead_width_coding_mib": mib(self.coding_bits),
            "container_bits": self.container_bits,
            "container_payload_mib": mib(self.container_payload_bits),
            "container_overhead_mib": mib(self.container_scale_bits),
            "float_mib": mib(self.float_bits),
            "sensitivity": self.sensitivity,
        }


def joined(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The sum of histograms, by rising bits."""
    return dict(sorted(sum(map(Counter, histograms), Counter[int]()).items()))


@dataclass(frozen=True)
class SizeParts:
    """One of the three sizes of a whole model, in its parts. Parameters only: buffers, graph and names are not counted."""

    levels_bits: int
    """The quantized weights themselves."""
    overhead_bits: int
    """Their scales, zero points and coded widths."""
    rest_bits: int
    """The parameters that are not quantized."""

    @property
    def total_bits(self) -> int:
        """All parts together."""
        return self.levels_bits + self.overhead_bits + self.rest_bits

    @property
    def total_mib(self) -> float:
        """All parts together in MiB."""
        return mib(self.total_bits)

    def as_dict(self) -> dict[str, float]:
        """Plain data for JSON, in MiB."""
        return {
            "levels_mib": mib(self.levels_bits),
            "overhead_mib": mib(self.overhead_bits),
            "not_quantized_mib": mib(self.rest_bits),
            "total_mib": self.total_mib,
        }


@dataclass(frozen=True, kw_only=True)
class BitsNumbers:
    """What is known of the bits of a prepared or converted model."""

    model: str
    """Class of the model."""
    stage: Stage
    method: str
    """Class of the method's settings."""
    scope: str
    """How the model was captured: "model" (one graph) or "module" (rewritten modules)."""
    scope_reason: str
    """Why that scope; empty where it is not known."""
    weights: tuple[WeightBits, ...]
    """One row per quantized weight, in the model's order."""
    skipped: tuple[SkippedWeight, ...]
    """The parameters that stay in float, and why."""
    rest_bits: int
    """Size of the skipped parameters as they are kept (float32 or float16)."""
    rest_float_bits: int
    """Size of the skipped parameters in the float model."""
    buffer_bits: int = 0
    """What the state holds beside the parameters (statistics, tables of indices), as files keep it. No size has it in it."""
    target_bits: float | None = None
    """Bits per weight that training aims at, scales and coded widths included."""
    target_mib: float | None = None
    """Size of the whole model that training aims at."""
    penalty: float | None = None
    """The paper's lambda that was asked for, loss per MiB."""
    lambda_per_bit: float | None = None
    """What a bit costs now, in loss per bit of size: the Lagrange multiplier of the target, or the penalty. None if not known."""
    settings: tuple[str, ...] = ()
    """The settings of the methods that are not the defaults, a line for each pattern of names."""
    allocation: str = ""
    """Which widths became final: the learned ones, or the same for all groups where that was better; empty before they are."""
    notes: tuple[str, ...] = ()
    """What else one should know."""
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """What was logged in training (``model.compression.log(loss=...)`` adds to it): name -> (step, value), 256 of each at most."""

    @property
    def target(self) -> str:
        """What training aims at, in words; empty without a target."""
        if self.target_bits is not None:
            return f"{self.target_bits:g} bits per quantized weight, scales and coded widths included"
        return "" if self.target_mib is None else f"{self.target_mib:g} MiB for the whole model"

    @property
    def numel(self) -> int:
        """Number of quantized weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def histogram(self) -> dict[int, int]:
        """Bits -> number of weights that have them, over the whole model."""
        return joined(weight.histogram for weight in self.weights)

    @property
    def packed_size(self) -> SizeParts:
        """Bit-packed: ``model_size(model, exact=True)``, every group at its own width."""
        levels = sum(weight.payload_bits for weight in self.weights)
        return SizeParts(levels, sum(weight.overhead_bits for weight in self.weights), self.rest_bits)

    @property
    def container_size(self) -> SizeParts:
        """Estimate of the ONNX file: every weight in one of ONNX's widths. Layouts that split a weight by width take less."""
        levels = sum(weight.container_payload_bits for weight in self.weights)
        return SizeParts(levels, sum(weight.container_scale_bits for weight in self.weights), self.rest_bits)

    @property
    def float_size(self) -> SizeParts:
        """The model as it was."""
        return SizeParts(sum(weight.float_bits for weight in self.weights), 0, self.rest_float_bits)

    @property
    def average_bits(self) -> float:
        """Bits per quantized weight, levels alone."""
        return self.packed_size.levels_bits / self.numel

    @property
    def average_bits_in_all(self) -> float:
        """Bits per quantized weight with scales, zero points and coded widths: what ``target_bits`` speaks of."""
        return (self.packed_size.levels_bits + self.packed_size.overhead_bits) / self.numel

    @property
    def compression_ratio(self) -> float:
        """Float size over bit-packed size, of the whole model."""
        return self.float_size.total_mib / self.packed_size.total_mib

    @property
    def lambda_per_mib(self) -> float | None:
        """:attr:`lambda_per_bit` as the paper has it, in loss per MiB."""
        return None if self.lambda_per_bit is None else self.lambda_per_bit / mib(1)

    def as_dict(self) -> dict[str, Any]:
        """The whole report as plain data that JSON can hold; sizes in MiB."""
        names = (
            "model stage method scope scope_reason average_bits average_bits_in_all target_bits target_mib lambda_per_mib lambda_per_bit "
            "compression_ratio"
        )
        return {
            **{name: getattr(self, name) for name in names.split()},
            "quantized_weights": self.numel,
            "histogram": {str(width): count for width, count in self.histogram.items()},
            "penalty_per_mib": self.penalty,
            "allocation": self.allocation,
            "buffers_mib": mib(self.buffer_bits),
            "sizes": {
                "bit_packed": self.packed_size.as_dict(),
                "onnx_container": self.container_size.as_dict(),
                "float": self.float_size.as_dict(),
            },
            "weights": [weight.as_dict() for weight in self.weights],
            "settings": list(self.settings),
            "skipped": [{"name": s.name, "shape": list(s.shape), "reason": s.reason} for s in self.skipped],
            "notes": list(self.notes),
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
        }
