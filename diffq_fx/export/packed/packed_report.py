"""What lies in a packed file: for every weight its widths, what it takes, and how close that is to its entropy."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq_fx.arguments import as_path
from diffq_fx.export.packed.container import VERSION
from diffq_fx.export.packed.dtypes import FLOAT_TYPES, TENSOR_TYPES
from diffq_fx.export.packed.header import PlainTensor
from diffq_fx.export.packed.reader import PackedReader, opened
from diffq_fx.export.packed.shards import Shard
from diffq_fx.export.packed.weight_kind import PackedWeight, expanded

_TABLE = 1 << 16
_Counts = NDArray[np.int64]


@dataclass(frozen=True)
class PackedWeightReport:
    """One quantized weight. Sizes are in bytes; those of codes that share a model are shared out by their ideal length."""

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    group_size: int | str
    grid: str
    description: str  # its groups and grid, or its codebook
    values: int  # number of weights
    bits: dict[int, int]  # number of codes of each width
    bit_packed_bytes: int  # its codes at exactly their widths
    entropy_bytes: float  # the order-0 entropy of its codes, each width by itself
    coded_bytes: float  # its codes as they are in the file
    side_bytes: float  # its widths, zero points, scales and codebook as they are in the file


@dataclass(frozen=True)
class PlainTensorReport:
    """One tensor that is stored as it is."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str
    stored_bytes: float  # what it takes in the file; that of small tensors, which are coded together, is shared out by their size


@dataclass(frozen=True)
class PackedInspection:
    """A packed file."""

    path: str
    version: int
    file_bytes: int
    shards: int
    weights: tuple[PackedWeightReport, ...]
    tensors: tuple[PlainTensorReport, ...]

    @property
    def header_bytes(self) -> int:
        """What is neither a weight nor a tensor: names, models' places, checksums, filler."""
        weights = sum(weight.coded_bytes + weight.side_bytes for weight in self.weights)
        return round(self.file_bytes - weights - sum(tensor.stored_bytes for tensor in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self) | {"header_bytes": self.header_bytes}


class _Tally:
    """What has been counted of one weight."""

    def __init__(self, packed: PackedWeight) -> None:
        self.counts: dict[int, _Counts] = defaultdict(lambda: np.zeros(_TABLE, np.int64))
        self.coded = 0.0
        self.side = float(packed.common.nbytes if packed.common_type else 0)


def inspect_packed(path: str | Path) -> PackedInspection:
    """Look into a packed file; everything in it is decoded and checked.

    Raises:
        PackedFileError: the file is missing, damaged, or not a packed file.
        TypeError: the path is of another type.
    """
    with opened(as_path("inspect_packed", "path", path)) as reader:
        contents = reader.contents
        tallies = [_Tally(packed) for packed in contents.weights]
        for shard in contents.shards:
            _count_shard(reader, shard, tallies)
        reader.plain_tensors()
        small = contents.small
        share = 0.0 if small is None else (small.stop - small.start) / small.size
        weights = tuple(_weight_report(packed, tally) for packed, tally in zip(contents.weights, tallies, strict=True))
        tensors = tuple(_tensor_report(tensor, share if tensor.is_small else 1.0) for tensor in contents.tensors)
        return PackedInspection(str(path), VERSION, reader.size, len(contents.shards), weights, tensors)


def _count_shard(reader: PackedReader, shard: Shard, tallies: list[_Tally]) -> None:
    """Add a shard to what has been counted of its weights."""
    of_weight: dict[tuple[int, int], _Counts] = defaultdict(lambda: np.zeros(_TABLE, np.int64))
    side: dict[int, float] = defaultdict(float)
    for part, decoded in reader.decode(shard).parts():
        each = np.broadcast_to(expanded(decoded.widths, part.packed.layout), decoded.codes.shape)
        for width in decoded.present.tolist():
            of_weight[part.weight, width] += np.bincount(decoded.codes[each == width], minlength=_TABLE)
        side[part.weight] += decoded.widths.size / 2 + len(decoded.integers) + len(decoded.floats)
    everyone: dict[int, _Counts] = defaultdict(lambda: np.zeros(_TABLE, np.int64))
    for (_, width), counts in of_weight.items():
        everyone[width] += counts
    ideal = {key: _length(counts, everyone[key[1]]) for key, counts in of_weight.items()}
    *stored, coded = shard.sections
    for (weight, width), counts in of_weight.items():
        tallies[weight].counts[width] += counts
        tallies[weight].coded += coded * ideal[weight, width] / max(sum(ideal.values()), 1e-9)
    for weight, size in side.items():
        tallies[weight].side += sum(stored) * size / sum(side.values())


def _length(counts: _Counts, model: _Counts) -> float:
    """Bits of values with these counts, coded for the frequencies of ``model``."""
    used = counts > 0
    return float(counts[used] @ np.log2(model.sum() / model[used]))


def _weight_report(packed: PackedWeight, tally: _Tally) -> PackedWeightReport:
    spec, bits = packed.spec, {width: int(counts.sum()) for width, counts in sorted(tally.counts.items())}
    return PackedWeightReport(
        **{key: getattr(spec, key) for key in ("name", "aliases", "shape", "group_size", "grid")},
        **{"kind": packed.kind, "dtype": FLOAT_TYPES.name(spec.dtype), "description": packed.description, "values": spec.numel},
        bits=bits,
        bit_packed_bytes=-(-sum(width * count for width, count in bits.items()) // 8),
        entropy_bytes=sum(_length(counts, counts) for counts in tally.counts.values()) / 8,
        coded_bytes=tally.coded,
        side_bytes=tally.side,
    )


def _tensor_report(tensor: PlainTensor, share: float) -> PlainTensorReport:
    dtype, stored = TENSOR_TYPES.name(tensor.dtype), TENSOR_TYPES.name(tensor.stored_dtype)
    return PlainTensorReport(tensor.names[0], tensor.names[1:], tensor.shape, dtype, stored, (tensor.stop - tensor.start) * share)
