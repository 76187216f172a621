"""Levels in the blocks of GGML: 32 weights with a float16 scale, and a float16 minimum where the type has one; exact, or not at all.

With ``n`` a level less its zero point and ``d`` its scale, a weight is ``n d``. Types without a minimum hold ``n`` as a signed integer;
those with one hold ``n - base`` unsigned beside the minimum ``base d``, for a ``base`` that makes this product a float16 value.

Shape legend: O rows, I columns, P some of the rows, B = I / 32 blocks of a row, K = 32 weights of a block.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx.errors import ExportError
from diffq_fx.functional.groups import rows_of
from diffq_fx.runtimes import how_to_prepare
from diffq_fx.storage import IntegerWeight
from diffq_fx.storage.packing import unpack_rows

BLOCK = 32


class BlockType(NamedTuple):
    """A type of GGML by its name: how many bits an integer has, and whether a minimum stands beside the scale."""

    name: str
    bits: int
    has_minimum: bool

    @property
    def block_bytes(self) -> int:
        """Bytes of 32 weights."""
        return 2 + 2 * self.has_minimum + BLOCK * self.bits // 8

    @property
    def lowest(self) -> int:
        """The smallest integer."""
        return 0 if self.has_minimum else -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer."""
        return self.lowest + 2**self.bits - 1


TYPES = (
    BlockType("Q4_0", 4, False),
    BlockType("Q4_1", 4, True),
    BlockType("Q5_0", 5, False),
    BlockType("Q5_1", 5, True),
    BlockType("Q8_0", 8, False),
)
"""From small to large: 4.5, 5, 5.5, 6 and 8.5 bits a weight."""


class _Blocks(NamedTuple):
    """Some rows: ``w = integers scale``, and with a minimum (the float grid's) ``w = integers scale + minimum``."""

    integers: Tensor
    """Shape (P, B, K)."""
    scale: Tensor
    """Shape (P, B)."""
    minimum: Tensor | None


class BlockedWeight:
    """A stored weight as blocks of the smallest type that holds all of it exactly.

    Args:
        stored: the weight; its rows are whole blocks, and its scales (on the float grid its offsets, too) are float16 values.

    Raises:
        ExportError: no type holds it.
    """

    def __init__(self, stored: IntegerWeight) -> None:
        self._stored, spec = stored, stored.spec
        self._levels = stored.levels.cpu()
        name, layout = f"weight {spec.name!r}", spec.scale_layout
        if spec.columns % BLOCK:
            raise ExportError(f"{name} has rows of {spec.columns} inputs, which are no whole blocks of {BLOCK}. Exclude it from prepare")
        if layout.kind == "block" and layout.block % BLOCK:
            raise ExportError(f"{name} has a scale for each {layout.block} inputs, and GGUF one for {BLOCK}. {how_to_prepare('gguf')}")
        for what, values in (("scale", stored.scale), ("offset", stored.offset)):
            if values is not None and len(wrong := values[~_is_half(values)]):
                raise ExportError(
                    f"{name}: {len(wrong)} of its {values.numel()} {what}s are no float16 values, first {wrong[0].item()!r}. "
                    + how_to_prepare("gguf")
                )
        self.type = self._smallest_type()

    def _smallest_type(self) -> BlockType:
        possible, lowest, highest = list(TYPES), 0, 0
        for rows in self._stored.spec.scale_layout.row_slices(torch.device("cpu")):
            blocks = self._blocks(rows)
            possible = [each for each in possible if _holds(each, blocks)]
            lowest, highest = min(lowest, int(blocks.integers.min())), max(highest, int(blocks.integers.max()))
        if not possible:
            widest = TYPES[-1] if self._stored.offset is None else TYPES[-2]
            raise ExportError(
                f"weight {self._stored.spec.name!r} needs integers from {lowest} to {highest} times its scales; {widest.name}, the widest "
                f"type for its grid, has {widest.lowest} to {widest.highest}. {how_to_prepare('gguf')}"
            )
        return possible[0]

    def data(self) -> NDArray[np.uint8]:
        """The bytes, shape (O, B times the bytes of a block)."""
        spec = self._stored.spec
        found = np.empty((spec.rows, spec.columns // BLOCK * self.type.block_bytes), np.uint8)
        for rows in spec.scale_layout.row_slices(torch.device("cpu")):
            found[rows] = _packed(self.type, self._blocks(rows)).reshape(rows.stop - rows.start, -1)
        return found

    def _blocks(self, rows: slice) -> _Blocks:
        stored, spec = self._stored, self._stored.spec
        count = spec.columns // BLOCK

        def by_block(values_RC: Tensor) -> Tensor:
            each = rows_of(values_RC, rows).cpu().float()
            if spec.scale_layout.kind == "block":
                each = each.repeat_interleave(spec.scale_layout.block // BLOCK, 1)[:, :count]
            return each.expand(rows.stop - rows.start, count)

        levels_PBK = unpack_rows(self._levels, stored.container_bits, spec.columns, rows).reshape(-1, count, BLOCK)
        scale_PB = by_block(stored.scale)
        if stored.offset is not None:
            return _Blocks(levels_PBK, scale_PB, by_block(stored.offset))
        zero_PB = by_block(stored.zero_point)  # type: ignore[arg-type]  # there is one where there is no offset
        steps_PB = torch.where(zero_PB.frac() == 0, 1, 2)  # of half a scale where the zero point lies half-way between two levels
        integers_PBK = ((levels_PBK - zero_PB[..., None]) * steps_PB[..., None]).to(torch.int32)
        return _Blocks(integers_PBK, scale_PB / steps_PB, None)


def _is_half(values: Tensor) -> Tensor:
    """Which values are float16 values."""
    return values.half().to(values.dtype) == values


def _holds(each: BlockType, blocks: _Blocks) -> bool:
    low_PB, high_PB = blocks.integers.amin(-1), blocks.integers.amax(-1)
    if blocks.minimum is not None:
        return each.has_minimum and int(high_PB.max()) <= each.highest
    if each.has_minimum:
        return bool((_bases(each, blocks) <= low_PB).all())
    return bool(_is_half(blocks.scale).all()) and int(low_PB.min()) >= each.lowest and int(high_PB.max()) <= each.highest


def _bases(each: BlockType, blocks: _Blocks) -> Tensor:
    """The largest integer of each block that can be its base; one above the smallest of its integers where none can."""
    low_PB, high_PB = blocks.integers.amin(-1), blocks.integers.amax(-1)
    base_PB = low_PB + 1
    for below in range(each.highest, -1, -1):
        candidate_PB = low_PB - below
        fits_PB = (high_PB - candidate_PB <= each.highest) & _is_half(candidate_PB * blocks.scale) & _is_half(blocks.scale)
        base_PB = torch.where(fits_PB, candidate_PB, base_PB)
    return base_PB


def _packed(each: BlockType, blocks: _Blocks) -> NDArray[np.uint8]:
    """The bytes, shape (P, B, bytes of a block): scale, minimum, the fifth bits, and four bits of integers k and k + 16, or eight."""
    integers_PBK, scale_PB, minimum_PB = blocks
    if each.has_minimum and minimum_PB is None:
        base_PB = _bases(each, blocks)
        integers_PBK, minimum_PB = integers_PBK - base_PB[..., None], base_PB * scale_PB
    halves = [values_PB.contiguous().numpy().astype("<f2") for values_PB in (scale_PB, minimum_PB) if values_PB is not None]
    parts = [values_PB.view(np.uint8).reshape(*values_PB.shape, 2) for values_PB in halves]
    if each.bits == 8:
        return np.concatenate([*parts, integers_PBK.to(torch.int8).numpy().view(np.uint8)], -1)
    integers = (integers_PBK - each.lowest).to(torch.uint8).numpy()
    if each.bits == 5:
        parts.append(np.packbits(integers >> 4, axis=-1, bitorder="little"))
    low, high = np.split(integers & np.uint8(15), 2, -1)
    return np.concatenate([*parts, low | high << np.uint8(4)], -1)
