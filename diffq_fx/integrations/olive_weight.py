"""One matrix as folders of ``quant_method`` "olive" have it: unsigned levels, scales and zero points, packed along the inputs."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.table import read_table
from diffq_fx.runtimes import RUNTIMES, how_to_prepare
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.packing import pack_levels

_RUNTIME = "onnxruntime-genai"
_FEWEST, *_, _MOST = (int(size) for size in RUNTIMES[_RUNTIME].blocks)
"""Inputs that share a scale."""
_WIDEST = 8


class HeldWeight(NamedTuple):
    """How a file holds one matrix."""

    bits: int
    """Of the widest group, as learned."""
    container_bits: int
    """2, 4 or 8."""
    group_size: int
    """Inputs that share a scale."""


@dataclass(frozen=True)
class OliveWeight:
    """One matrix as the format has it. Shape legend: O outputs, I inputs, G groups of inputs."""

    levels: Tensor
    """int32, shape (O, I), unsigned."""
    scale: Tensor
    """float32, shape (O, G)."""
    zero_point: Tensor
    """int32, shape (O, G)."""
    held: HeldWeight

    def tensors(self, rows: slice) -> dict[str, Tensor]:
        """What the folder has of some of the outputs."""
        scale, zero_point = self.scale[rows], self.zero_point[rows]
        missing = -zero_point.shape[1] % (8 // self.held.container_bits)
        padded = nn.functional.pad(zero_point, (0, missing))  # a row begins at a byte
        packed = (pack_levels(each, self.held.container_bits).reshape(len(scale), -1) for each in (self.levels[rows], padded))
        return dict(zip(("qweight", "qzeros"), packed, strict=True)) | {"scales": scale.contiguous()}


def olive_weight(stored: StoredWeight) -> OliveWeight:
    """A stored weight in this format, computing the same; an error if it has none."""
    name = stored.spec.name
    integers = stored.as_integers()
    if not isinstance(integers, IntegerWeight):
        raise ExportError(f"weight {name!r} has a codebook that is not integers times one scale; the format has those alone.")
    spec, table, layout = integers.spec, read_table(integers), integers.spec.scale_layout
    if len(spec.shape) != 2:
        raise ExportError(f"weight {name!r} has the shape {spec.shape}; the format has matrices alone.")
    if (container := table.kernel_bits) > _WIDEST:
        raise ExportError(f"weight {name!r}: {table.widest}; the format has up to {_WIDEST} bits. {how_to_prepare(_RUNTIME)}.")
    if (group := math.gcd(layout.block, layout.columns, _MOST)) < _FEWEST:
        raise ExportError(
            f"weight {name!r} has {layout.columns} inputs and a scale for {layout.block} of them; the format has scales for {_FEWEST}, 32, "
            f"64 or {_MOST}, which must divide both. {how_to_prepare(_RUNTIME)}."
        )
    half = 2 ** (container - 1)
    scale, levels = torch.from_numpy(table.scale), torch.from_numpy(table.levels)
    zero_point = torch.full_like(scale, half, dtype=torch.int32) if table.zero_point is None else torch.from_numpy(table.zero_point)
    scale_OG, zero_point_OG = (layout.expand(each).expand(spec.rows, spec.columns)[:, ::group] for each in (scale, zero_point))
    held = HeldWeight(table.most_bits, container, group)
    return OliveWeight(levels + half if table.signed else levels, scale_OG, zero_point_OG, held)
