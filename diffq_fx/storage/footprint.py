"""What one quantized weight takes: the parts of its sizes, whatever its method and its storage are."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffq_fx import functional
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.budget.size import exact_bits
from diffq_fx.storage.packing import container_for
from diffq_fx.weights import WeightSpec


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The parts that the sizes of one weight are sums of, in bits."""

    grid: str
    """What its values stand for: levels on a grid, or "codebook"."""
    histogram: dict[int, int]
    """Bits -> number of values (levels or codes) that have them, by rising bits."""
    scale_bits: int
    """Bit-packed: scales, zero points or ends of the ranges, limits of the widths; a codebook."""
    coding_bits: int = 0
    """Bit-packed: one code per group that says how wide it is."""
    container_bits: int
    """The narrowest container that holds every value."""
    container_scale_bits: int
    """What stands beside the values in the container."""
    group_bits: Tensor | None = field(default=None, repr=False, compare=False)
    """The width of every group, uint8, on the CPU: shape (1, 1) for one of the weight, (rows, 1) for one of each output channel, (rows,
    blocks) for one of each block; None for a codebook."""

    @property
    def packed_bits(self) -> int:
        """All of the bit-packed size."""
        return self.payload_bits + self.scale_bits + self.coding_bits

    @property
    def payload_bits(self) -> int:
        """Bit-packed: the values alone, each at its own width."""
        return sum(width * count for width, count in self.histogram.items())

    @property
    def container_payload_bits(self) -> int:
        """The values alone in their container."""
        return sum(self.histogram.values()) * self.container_bits


def grid_footprint(spec: WeightSpec, bits: Tensor) -> Footprint:
    """What integers on a grid take; its bit-packed parts sum up to what :func:`~diffq_fx.budget.size.exact_bits` counts.

    Args:
        spec: the weight.
        bits: whole widths, shape of the spec's ``bits_layout``.

    Returns:
        The parts.

    Example:
        >>> spec = WeightSpec(name="w", shape=(2, 8), axis=0)
        >>> grid_footprint(spec, torch.tensor([[3], [4]])).packed_bits  # 27 + 36 for levels and zero points, 72 for scales, 2 for widths
        137
    """
    width = bits.detach().reshape(-1).cpu().long()
    total = torch.bincount(width, weights=spec.bits_layout.counts().reshape(-1).double())
    histogram = {index: int(count) for index, count in enumerate(total.tolist()) if count}
    payload = sum(each * count for each, count in histogram.items())
    coding = width.numel() * math.ceil(math.log2(1 + max(histogram) - min(histogram)))
    container = container_for(max(histogram))
    # What an ONNX file has beside a scale: a zero point as wide as the levels, which are doubled for a half; or the float grid's offset.
    doubled = container_for(max(max(histogram), min(max(histogram), functional.WIDEST_HALF) + 1))
    second = {"symmetric": 0, "affine": container, "half": doubled, "float": spec.scale_bits}[spec.grid]
    return Footprint(
        grid=spec.grid,
        histogram=histogram,
        scale_bits=exact_bits(FlatGroups([spec], torch.device("cpu")), width) - payload - coding,
        coding_bits=coding,
        container_bits=container,
        container_scale_bits=spec.scale_layout.num_groups * (spec.scale_bits + second),
        group_bits=width.to(torch.uint8).view(spec.bits_layout.shape),
    )
