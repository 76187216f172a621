"""How the weights of one tensor are divided into groups that share a number of bits or a range.

Every layout works on the *rows* of a weight: the output channel axis moved to the front and the rest flattened.
Groups never straddle rows, so each of them lies along an axis of ONNX's DequantizeLinear.

Shape legend: O rows (output channels), I columns (inputs of one row), R x C the grid of groups, one of
(1, 1) per tensor, (O, 1) per channel, (O, ceil(I / block)) per block. Group values of two layouts broadcast together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1 << 18
"""Elements that are worked on at a time on a CPU: many enough for the cost of a call not to show, few enough to stay in the cache."""
GroupKind = Literal["tensor", "channel", "block"]
GroupSize = int | Literal["tensor", "channel"]
"""What users write: weights that share something, as a block length along the input axis, "channel" or "tensor"."""


def tiles(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Rows of (R, C), or of a row its places, in pieces that stay in a CPU's cache; on other devices in one."""
    height = max(1, TILE // max(math.prod(shape[1:]), 1)) if device.type == "cpu" else max(shape[0], 1)
    return (slice(top, top + height) for top in range(0, shape[0], height))


def to_rows(weight: Tensor, axis: int) -> Tensor:
    """View (or copy, where strides demand it) a weight as rows, shape (O, I)."""
    return (weight.movedim(axis, 0) if axis else weight).reshape(weight.shape[axis], -1)


def rows_of(values_RC: Any, rows: slice) -> Any:
    """Values per group of some of the rows; those that all rows share stay as they are."""
    return values_RC if values_RC.shape[0] == 1 else values_RC[rows]


def largest_in(values_RC: Tensor, shape: Sequence[int]) -> Tensor:
    """The largest of the values of all groups that lie in one group of another layout, of this shape.

    Example:
        >>> largest_in(torch.tensor([[1, 5], [2, 3]]), (2, 1)).tolist()
        [[5], [3]]
    """
    for axis, size in enumerate(shape):
        if size == 1 < values_RC.shape[axis]:
            values_RC = values_RC.amax(axis, keepdim=True)
    return values_RC


def from_rows(rows_OI: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Undo :func:`to_rows`: rows of shape (O, I) back to a weight of ``shape``."""
    if axis == 0:
        return rows_OI.reshape(shape)
    moved = [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]
    return rows_OI.reshape(moved).movedim(0, axis)


@dataclass(frozen=True)
class GroupLayout:
    """The groups of a weight with ``rows`` x ``columns`` elements."""

    rows: int
    columns: int
    kind: GroupKind
    block: int
    """Columns in a group: the last block of a row may be shorter. Equal to ``columns`` unless ``kind`` is "block"."""

    @staticmethod
    def of(rows: int, columns: int, group_size: GroupSize) -> "GroupLayout":
        """Make a layout from what users write; a block as long as a row is the same as "channel"."""
        if isinstance(group_size, str):
            return GroupLayout(rows, columns, group_size, columns)
        if group_size < columns:
            return GroupLayout(rows, columns, "block", group_size)
        return GroupLayout(rows, columns, "channel", columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (R, C) of a tensor with one value per group."""
        if self.kind == "tensor":
            return (1, 1)
        return (self.rows, -(-self.columns // self.block))

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return self.shape[0] * self.shape[1]

    def counts(self, device: torch.device | None = None) -> Tensor:
        """Number of weights in each group, shape (R, C), int64."""
        if self.kind == "tensor":
            return torch.full((1, 1), self.rows * self.columns, device=device)
        widths = torch.full(self.shape, self.block, device=device)
        widths[:, -1].fill_(self.columns - self.block * (self.shape[1] - 1))
        return widths

    def counts_on(self, device: torch.device) -> Tensor | float:
        """The same as a factor for values of shape (R, C) on a device: one number where all groups have as many, and no copy to it."""
        return self.counts(device) if self.columns % self.block else self.rows * self.columns / self.num_groups

    def aminmax(self, rows_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each group, both of shape (R, C)."""
        if self.kind == "tensor":
            low, high = torch.aminmax(rows_OI)
            return low.reshape(1, 1), high.reshape(1, 1)
        blocks = self.blocks(rows_OI, edge=True)
        return blocks.amin(-1), blocks.amax(-1)  # several times faster than aminmax along an axis

    def at_ends(self, rows_OI: Tensor) -> Tensor:
        """Which weights are the smallest or the largest of their group, bool, shape (O, I)."""
        low_OI, high_OI = map(self.expand, self.aminmax(rows_OI))
        return (rows_OI == low_OI) | (rows_OI == high_OI)

    def sum(self, rows_OI: Tensor) -> Tensor:
        """Sum over each group, shape (R, C)."""
        if self.kind == "tensor":
            return rows_OI.sum().reshape(1, 1)
        return self.blocks(rows_OI).sum(-1)

    def expand(self, values_RC: Tensor) -> Tensor:
        """Values per group as a tensor that broadcasts against rows of shape (O, I)."""
        if values_RC.shape[1] == 1:
            return values_RC
        return values_RC.repeat_interleave(self.block, dim=1)[:, : self.columns]

    def row_slices(self, device: torch.device) -> Iterator[slice]:
        """The rows in pieces that stay in a CPU's cache, of a multiple of 8 rows each but for the last; on other devices in one piece."""
        height = max(8, TILE // max(self.columns, 1) // 8 * 8) if device.type == "cpu" else max(self.rows, 1)
        return (slice(top, min(top + height, self.rows)) for top in range(0, self.rows, height))

    def of_rows(self, rows: slice) -> "GroupLayout":
        """The layout of some of the rows alone."""
        return replace(self, rows=rows.stop - rows.start)

    def blocks(self, rows_OI: Tensor, edge: bool = False) -> Tensor:
        """Rows as (O, C, block), a short last block filled up with zeros or with copies of its own last weight."""
        missing = self.shape[1] * self.block - self.columns
        if missing:
            filled = rows_OI[:, -1:].expand(-1, missing)
            rows_OI = torch.cat([rows_OI, filled], 1) if edge else F.pad(rows_OI, (0, missing))
        return rows_OI.reshape(self.rows, self.shape[1], self.block)


def combine(first: GroupLayout, second: GroupLayout) -> GroupLayout:
    """Layout of values that depend on a group of ``first`` and a group of ``second``: the finer of the two."""
    order = {"tensor": 0, "channel": 1, "block": 2}
    return first if order[first.kind] >= order[second.kind] else second


def scale_layout_of(scale: Tensor, rows: int, columns: int, block: int) -> GroupLayout:
    """The layout that a scale of shape (1, 1), (O, 1) or (O, C) has."""
    kind: GroupKind = "block" if scale.shape[1] > 1 else "channel" if scale.shape[0] == rows else "tensor"
    return GroupLayout(rows, columns, kind, block)
