"""What a graph is laid out for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffq_fx.export.onnx.layout.cost import Machines

Range = tuple[float, float]

BLOCKED_OPSET = 21
"""The first opset whose DequantizeLinear has blocks, which every fused product needs."""


Twin = Literal["float", "rounded"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayoutRequest:
    """What the user asks for, and what the export has found out on its way."""

    machines: Machines
    """What tells the times of a product's forms; not asked in layout "qdq"."""
    layout: Literal["onnxruntime", "qdq"] = "onnxruntime"
    activations: Literal["float", "dynamic", "int8"] = "float"
    target: str = "portable"
    """What ``machines`` is made of, as the user calls it."""
    min_container: int = 2
    """The smallest container in bits."""
    opset: int | None = None
    """What the user asked for; None for the smallest that holds the graph."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Symbolic size of the graph -> what it is at the example inputs."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Name of a weight -> why no integer kernel shall read it."""
    halved: frozenset[str] = frozenset()
    """Initializers that the file will hold as float16."""
    ranges: Mapping[str, Range] | None = None
    """Name of a value -> its calibrated range; None before the calibration."""
    twin: Twin = None
    """Make the same graph with products in float, of activations that are not rounded, to compare it with PyTorch and to calibrate; or of
    rounded ones in front of linear layers, to tell what rounding alone changes."""

    @property
    def rounds(self) -> bool:
        """Whether activations may be rounded in the graph."""
        return self.activations != "float"

    @property
    def has_blocks(self) -> bool:
        """Whether the opset has what fused products need."""
        return self.opset is None or self.opset >= BLOCKED_OPSET
