"""Writes the bytes of a shard: see :mod:`diffq_fx.export.packed.shards` for what they are."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from diffq_fx.export.packed.coding.bitplanes import Values
from diffq_fx.export.packed.coding.classes import BIN_BITS, ClassTable, Histogram, bins_of, merged_bins
from diffq_fx.export.packed.coding.streams import Stream, encode_block, encode_bytes
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.export.packed.kinds.decoded import PartCodes
from diffq_fx.export.packed.shards import Part, ShardHead, Span, least_bytes, parts_of, tiles_of_part
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.storage import StoredWeight

FEW_WEIGHTS = 1 << 19
"""Weights that the slower coder of entropy may take, some tens of milliseconds."""


def encode_shard(
    spans: Sequence[Span], weights: Sequence[PackedWeight], stored: Sequence[StoredWeight], *, entropy: bool
) -> tuple[bytes, ShardHead]:
    """Encode rows of weights.

    Args:
        spans: the rows.
        weights: all weights of the file.
        stored: what they pack.
        entropy: False to bit-pack everything.

    Returns:
        The shard's bytes, and what the header must say of them.
    """
    is_patient = sum(span.rows * weights[span.weight].spec.columns for span in spans) <= FEW_WEIGHTS
    code = functools.partial(encode_block, entropy=entropy, is_patient=is_patient)
    parts = parts_of(spans, weights)
    contents = [part.packed.encode(stored[part.weight], part.rows) for part in parts]
    histogram, bins = Histogram(), []
    for part, content in zip(parts, contents, strict=True):
        widths = _per_column(content.widths, part.packed.layout)
        bins.append(bins_of(content.codes, widths) if entropy else np.zeros(1, np.uint8))
        histogram.add(content.codes, widths, bins[-1])
    table = ClassTable(histogram.classes(by_bin=entropy))
    merged = merged_bins(table.classes)
    bins = [merged[each] for each in bins]
    sections = [
        code([Stream(4, np.concatenate([c.widths.reshape(-1) for c in contents]) - np.uint8(1))]),
        code([Stream(BIN_BITS, np.concatenate(bins))]) if entropy else b"",
        code(_integer_streams(parts, contents)),
        encode_bytes(b"".join(content.floats for content in contents), entropy=entropy, is_patient=is_patient),
        code(_code_streams(parts, contents, bins, table)),
    ]
    data = b"".join(sections)
    filler = least_bytes(spans, weights) - len(data)
    return data + bytes(max(filler, 0)), ShardHead(table.classes, tuple(len(section) for section in sections))


def _per_column(widths: NDArray[np.uint8], layout: GroupLayout) -> NDArray[np.uint8]:
    """Widths that broadcast with codes of shape (O, I)."""
    return widths if widths.shape[1] == 1 else np.repeat(widths, layout.block, axis=1)[:, : layout.columns]


def _code_streams(
    parts: Iterable[Part], contents: Iterable[PartCodes], bins: Iterable[NDArray[np.uint8]], table: ClassTable
) -> list[Stream]:
    """The codes of each class, in the order of tiles and groups."""
    pieces: list[list[Values]] = [[] for _ in table.classes]
    for part, content, row_bins in zip(parts, contents, bins, strict=True):
        for tile in tiles_of_part(part, content.widths, row_bins, table):
            groups = content.codes[:, tile.columns].reshape(-1, tile.length)
            order = tile.order()
            flat = (groups if order is None else groups[order]).reshape(-1)
            ends = np.cumsum(tile.counts(len(pieces)))
            for index in np.flatnonzero(np.diff(ends, prepend=0)):
                pieces[index].append(flat[ends[index - 1] if index else 0 : ends[index]])
    return [Stream(each.width, _narrow(np.concatenate(piece), each.width)) for each, piece in zip(table.classes, pieces, strict=True)]


def _integer_streams(parts: Iterable[Part], contents: Sequence[PartCodes]) -> list[Stream]:
    """The small integers by their width, from 1 to 16 bits, where there are any."""
    values = np.concatenate([content.integers for content in contents])
    widths = np.concatenate([p.packed.integer_widths(c.widths, p.shape[0]) for p, c in zip(parts, contents, strict=True)])
    return [Stream(width, _narrow(values[widths == width], width)) for width in np.unique(widths).tolist()]


def _narrow(values: Values, width: int) -> Values:
    return values.astype(np.uint8 if width <= 8 else np.uint16)
