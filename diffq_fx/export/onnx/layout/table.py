"""One quantized weight as numbers: what the layout rules read, and how the file may hold it.

A zero point of ONNX is an integer. For one that is a half-integer, levels and zero point are doubled and the scale is halved, which gives
the same floats bit by bit. Doubled levels of 2 or 4 bits need a wider container: the file holds those as they were learned, and they are
doubled when it is loaded.

Shape legend: O rows (output channels), I columns (inputs of one row), R x C the grid of scales as in :mod:`diffq_fx.functional.groups`.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np
import torch

from diffq_fx.errors import ExportError
from diffq_fx.storage import IntegerWeight
from diffq_fx.storage.packing import CONTAINER_BITS, container_for
from diffq_fx.weights import WeightSpec

Form = Literal["weight", "transposed", "rows"]
"""How an array lies in the file: as PyTorch has it, as its transpose [K, N], or as rows (O, I)."""

_PART_BYTES = 150
"""What one more initializer and its Cast node take in the file."""
_JOIN_BYTES = 500
"""What Concat, Gather and the nodes that make the indices take, without the part of each row."""
_BYTE = 8
_WIDEST_DOUBLED = 15
"""Bits of a level that fits 16 bits when it is doubled."""


@dataclass(frozen=True, eq=False)
class WeightTable:
    """The integers, scales and zero points of one weight, as kernels read them."""

    spec: WeightSpec
    levels: np.ndarray
    """int32, shape (O, I); with the zero point subtracted on the symmetric grid, unsigned else."""
    scale: np.ndarray
    """float32, shape (R, C)."""
    zero_point: np.ndarray | None
    """int32, the shape of ``scale``; None on the symmetric grid."""
    widths: np.ndarray
    """Smallest container that the file may hold each row in as learned, shape (O,)."""
    most_bits: int
    """Of the widest channel, as learned."""
    factor: np.ndarray | None = None
    """int32: 2 for levels that are doubled, else 1; the shape of ``scale``, or (1, 1) if all are. None where no zero point is a half."""

    @property
    def signed(self) -> bool:
        """Whether the levels are signed: the symmetric grid."""
        return self.zero_point is None

    @property
    def container_bits(self) -> int:
        """The container that holds every row as learned."""
        return int(self.widths.max())

    @cached_property
    def kernel_bits(self) -> int:
        """The container that holds every row as kernels read it."""
        return self.container_bits if self.factor is None else max(self.container_bits, _container_of(self.levels, self.zero_point))

    @property
    def widest(self) -> str:
        """What is too wide for a kernel."""
        return f"the widest channel has {self.most_bits}" + ("" if self.factor is None else " and is doubled for half-integer zero points")

    @cached_property
    def learned_levels(self) -> np.ndarray:
        """The levels before they were doubled."""
        if self.factor is None:
            return self.levels
        return self.levels // self.spec.scale_layout.expand(torch.from_numpy(self.factor)).numpy()

    @cached_property
    def learned_zero_point(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The zero points before they were doubled, rounded down; and 1 where that took a half off. None for what there is not."""
        if self.factor is None or self.zero_point is None:
            return self.zero_point, None
        return self.zero_point // self.factor, self.zero_point % self.factor

    @property
    def blocks(self) -> int:
        """Scales along one row, C."""
        return self.scale.shape[1]

    @cached_property
    def int8_stretch(self) -> np.ndarray:
        """What the scale of each row grows by so that the levels less their zero points fit int8: float32, (O, 1), 1 where they do."""
        zero_point = 0 if self.zero_point is None else self.zero_point
        centred, limits = self.levels - zero_point, np.iinfo(np.int8)
        needed = np.maximum(centred.max(1) / limits.max, centred.min(1) / limits.min)
        return np.maximum(needed, 1.0).astype(np.float32)[:, None]

    def per_channel(self) -> "WeightTable":
        """The same weight with one scale per output channel, made of one with that or one scale in all."""
        rows = self.spec.rows
        zero_point = None if self.zero_point is None else np.broadcast_to(self.zero_point, (rows, 1))
        return replace(self, scale=np.broadcast_to(self.scale, (rows, 1)), zero_point=zero_point)

    @property
    def is_per_tensor(self) -> bool:
        """Whether there is one scale."""
        return self.scale.size == 1

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return self.spec.scale_layout.block


def read_table(weight: IntegerWeight, min_container: int = CONTAINER_BITS[0]) -> WeightTable:
    """Read an integer weight, to be held in containers of so many bits or more.

    Raises:
        ExportError: The weight is on the paper's float grid, which has no ONNX form, or its zero points have none.
    """
    spec = weight.spec
    stored_scale, stored_zero_point, stored_bits = weight.get_buffer("scale"), weight.zero_point, weight.get_buffer("bits")
    if not isinstance(stored_zero_point, torch.Tensor):
        raise ExportError(
            f"weight {spec.name!r} is on the float grid, whose offset is a float; an ONNX zero_point is an integer. "
            'Train with grid="affine", "half" or "symmetric" to export.'
        )
    levels, middle = weight.levels_OI().cpu(), stored_zero_point.cpu()
    zero_point: np.ndarray | None = middle.int().numpy()
    if spec.grid == "symmetric":
        levels = levels - spec.scale_layout.expand(middle)
        zero_point = None
    bits = stored_bits.cpu().int()
    row_bits = bits.amax(1).expand(spec.rows).numpy()
    table = WeightTable(
        spec=spec,
        levels=levels.numpy(),
        scale=stored_scale.detach().float().cpu().numpy(),
        zero_point=zero_point,
        widths=np.array([container_for(max(int(b), min_container)) for b in row_bits]),
        most_bits=int(bits.max()),
    )
    return _doubled(table, middle, bits.expand(middle.shape)) if middle.is_floating_point() else table


def _doubled(table: WeightTable, zero_point: torch.Tensor, bits: torch.Tensor) -> WeightTable:
    """The weight with integers for zero points that are multiples of 1/2.

    Where a half-integer is among the widest channels all levels are doubled, for then one number says it and kernels need the container
    anyway; else those alone that need it.
    """
    if not torch.equal(2 * zero_point, (2 * zero_point).round()):
        raise ExportError(f"weight {table.spec.name!r} has zero points that are no multiples of 1/2.")
    is_half = zero_point != zero_point.round()
    if not is_half.any():
        return table
    if (most := int(bits[is_half].max())) > _WIDEST_DOUBLED:
        raise ExportError(
            f"weight {table.spec.name!r} has a half-integer zero point at {most} bits, which ONNX has no container for: up to "
            f'{_WIDEST_DOUBLED} are possible. Use grid="affine".'
        )
    factor = torch.full((1, 1), 2, dtype=torch.int32) if most == table.most_bits else 1 + is_half.int()
    levels = torch.from_numpy(table.levels) * table.spec.scale_layout.expand(factor)
    scale, middle = table.scale / factor.numpy().astype(np.float32), (factor * zero_point).int().numpy()
    return replace(table, levels=levels.numpy(), scale=scale, zero_point=middle, factor=factor.numpy())


def _container_of(*arrays: np.ndarray | None) -> int:
    """The smallest container of these unsigned integers."""
    return container_for(max(int(array.max()).bit_length() for array in arrays if array is not None))


@dataclass(frozen=True, eq=False)
class Storage:
    """How the file holds a weight: its form, and the container of each row."""

    table: WeightTable
    form: Form
    widths: np.ndarray
    """Container of each row, shape (O,)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the levels in the file."""
        if self.form == "rows":
            return self.table.levels.shape
        return self.table.spec.shape[::-1] if self.form == "transposed" else self.table.spec.shape

    @property
    def axis(self) -> int:
        """Of the output channels in the file."""
        axis = self.table.spec.axis
        return {"weight": axis, "transposed": 1 - axis, "rows": 0}[self.form]

    @cached_property
    def factor(self) -> np.ndarray | None:
        """What the levels are multiplied by when the file is loaded; None where the containers hold them as kernels read them."""
        fits = self.table.factor is None or (self.table.levels.max(1) < 2**self.widths).all()
        return None if fits else self.table.factor

    @cached_property
    def zero_point_bits(self) -> int:
        """The container of the zero points."""
        return self.widest if self.table.factor is None else max(self.widest, _container_of(self.table.zero_point))

    def levels(self, rows: np.ndarray | None = None) -> np.ndarray:
        """The levels as they lie in the file, of all rows or of some."""
        spec, held = self.table.spec, self.table.levels if self.factor is None else self.table.learned_levels
        picked = held if rows is None else held[rows]
        if self.form == "rows":
            return picked
        weight = np.moveaxis(picked.reshape(-1, *spec.shape[: spec.axis], *spec.shape[spec.axis + 1 :]), 0, spec.axis)
        return weight.T if self.form == "transposed" else weight

    def groups(self, values_RC: np.ndarray) -> np.ndarray:
        """Scales or zero points as they lie in the file: broadcastable to the levels if there is one per row, else 2D."""
        if self.table.blocks > 1:
            return values_RC if self.axis == 0 else values_RC.T
        shape = [1] * len(self.shape)
        shape[self.axis] = values_RC.shape[0]
        return values_RC.reshape(shape)

    @cached_property
    def parts(self) -> dict[int, np.ndarray]:
        """Container -> the rows that it holds, narrow containers first."""
        return {int(width): np.flatnonzero(self.widths == width) for width in np.unique(self.widths)}

    @property
    def width(self) -> int | None:
        """The container, None where there are several."""
        return next(iter(self.parts)) if len(self.parts) == 1 else None

    @property
    def widest(self) -> int:
        """The widest container."""
        return max(self.parts)

    @cached_property
    def part_of_row(self) -> np.ndarray:
        """For each row the place of its part among :attr:`parts`; sorting these numbers twice gives the row's place in the joined parts."""
        return np.searchsorted(np.array(list(self.parts)), self.widths)

    @property
    def part_bits(self) -> int:
        """Container of :attr:`part_of_row` and :attr:`factor`: the narrowest part's, which asks for no higher opset than the levels do."""
        return min(*self.parts, _BYTE)

    @property
    def file_bytes(self) -> int:
        """What the levels take in the file, with what it takes to join the parts; scales are the same in every storage."""
        levels = sum(-(-len(rows) * self.table.spec.columns * width // 8) for width, rows in self.parts.items())
        joins = 0 if self.width else _JOIN_BYTES + self.widths.size * self.part_bits // _BYTE
        return levels + joins + _PART_BYTES * (len(self.parts) - 1)


def one_container(table: WeightTable, form: Form) -> Storage:
    """Hold every row in the container of the widest, as learned."""
    return Storage(table, form, np.full_like(table.widths, table.container_bits))


def split_by_width(table: WeightTable, form: Form) -> Storage:
    """Hold the rows in the up to four containers that make the file smallest; onnxruntime joins them when it loads the file."""
    narrower = [width for width in CONTAINER_BITS if width < table.container_bits]
    choices = []
    for count in range(len(narrower) + 1):
        for picked in combinations(narrower, count):
            offered = np.array([*picked, table.container_bits])
            choices.append(Storage(table, form, offered[np.searchsorted(offered, table.widths)]))
    return min(choices, key=lambda storage: storage.file_bytes)
