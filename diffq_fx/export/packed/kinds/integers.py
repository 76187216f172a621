"""The kind "integer": levels on an affine, symmetric or float grid, with their scales and zero points.

A code is the residue ``(level - centre) mod 2^b``, taken as a number of ``[-2^(b-1), 2^(b-1))`` and folded to 0, -1, 1, -2, 2, ... in
this order, where the centre is the zero point, or on the float grid the level nearest to zero. The residue knows no zero point, so rows
of all zero points share one model; it takes no more values than the level itself; and its low bits, the sign first, tell hardly anything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx import functional
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding.bitplanes import Values
from diffq_fx.export.packed.coding.unpacking import Grid
from diffq_fx.export.packed.fileformat.dtypes import FLOAT_TYPES, bytes_of, tensor_of
from diffq_fx.export.packed.kinds import integer_scales as grids
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.export.packed.kinds.decoded import DecodedPart, PartCodes
from diffq_fx.export.packed.kinds.integer_scales import find_extents, scales_of
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import extension
from diffq_fx.storage import IntegerWeight
from diffq_fx.weights import WeightSpec

_SCALES = ("groups", "extents")
_ZERO_POINTS = ("none", "middle", "coded", "plain")


class PackedIntegers(PackedWeight):
    """An :class:`~diffq_fx.storage.IntegerWeight`.

    Facts:
        scale_dtype: type of scales and offsets.
        scale: "groups", one for each group; or "extents", ``extent / (2^b - 1)`` of each range.
        zero_point: "none", on the float grid; "middle", ``2^(b - 1)``; "coded", small integers of b bits; "plain", int32 among the floats.
            Where scales are "extents", there is one zero point for each range and width in it.
    """

    kind: ClassVar[str] = "integer"
    stored_type = IntegerWeight

    def __init__(self, spec: WeightSpec, scale_dtype: torch.dtype, scale: str, zero_point: str) -> None:
        super().__init__(spec)
        self.scale_dtype = scale_dtype
        self.scale = scale
        self.zero_point = zero_point
        self._layout, self._scale_layout, self._range_layout = spec.bits_layout, spec.scale_layout, spec.range_layout

    @property
    def layout(self) -> GroupLayout:
        """The layout of the bits."""
        return self._layout

    @property
    def description(self) -> str:
        """Its groups and grid."""
        return f"{self.spec.group_size}, {self.spec.grid}"

    def facts(self) -> dict[str, Any]:
        """Where scales and zero points come from."""
        return {"scale_dtype": FLOAT_TYPES.name(self.scale_dtype), "scale": self.scale, "zero_point": self.zero_point}

    @classmethod
    def of_facts(cls, spec: WeightSpec, facts: Mapping[str, Any]) -> "PackedIntegers":
        """Check the facts against each other and the spec."""
        scale, zero_point = facts.get("scale"), facts.get("zero_point")
        if scale not in _SCALES or zero_point not in _ZERO_POINTS:
            raise PackedFileError(f"scale {scale!r} and zero_point {zero_point!r} are not known")
        dtype = FLOAT_TYPES.parse(facts.get("scale_dtype"))
        if scale == "extents" and (zero_point == "plain" or not grids.may_have_extents(spec, dtype)):
            raise PackedFileError("its scales cannot be extents")
        return cls(spec, dtype, scale, zero_point)

    @classmethod
    def of_stored(cls, stored: IntegerWeight) -> "PackedIntegers":
        """Choose the smallest form of scales and zero points that gives them back exactly."""
        spec, scale = stored.spec, stored.scale
        for name, layout in (("scale", spec.scale_layout), ("bits", spec.bits_layout)):
            found = tuple(getattr(stored, name).shape)
            if found != layout.shape:
                raise PackedFileError(f"{name} has the shape {found}, the spec says {layout.shape}")
        widths = grids.array_of(stored.bits)
        if not ((widths >= 1) & (widths <= 16)).all():
            raise PackedFileError(f"widths must be from 1 to 16 bits, got {int(widths.min())} to {int(widths.max())}")
        widths = np.broadcast_to(widths, tuple(scale.shape))
        zero_point = grids.zero_point_form(stored.zero_point, widths)
        by_range = zero_point != "plain" and grids.may_have_extents(spec, scale.dtype)
        extents = by_range and grids.follows_from_ranges(QuantParams(scale, stored.zero_point, stored.offset), widths, spec)
        return cls(spec, scale.dtype, "extents" if extents else "groups", zero_point)

    def encode(self, stored: IntegerWeight, rows: slice) -> PartCodes:
        """Residues, zero points and scales of some rows."""
        levels = grids.levels_of_rows(stored, rows)
        widths = self.group_rows(grids.array_of(stored.bits), rows, self._layout)
        params = QuantParams(self._rows_of(stored.scale, rows), self._rows_of(stored.zero_point, rows), self._rows_of(stored.offset, rows))
        each = np.broadcast_to(widths, tuple(params.scale.shape))
        if (levels >> self._expand(each.astype(np.int32))).any():
            raise PackedFileError("a level does not fit the width of its group")
        residues = levels - self._expand(grids.centres(params, each).astype(np.int32))
        half = self._expand(1 << (each.astype(np.int32) - 1))
        residues = ((residues + half) & (2 * half - 1)) - half
        codes = np.where(residues < 0, -2 * residues - 1, 2 * residues).astype(np.uint8 if int(widths.max()) <= 8 else np.uint16)
        return PartCodes(codes, widths, self._integers(params, each), self._floats(params, each))

    def _rows_of(self, values: Any, rows: slice) -> Any:
        return None if values is None else self.group_rows(values.detach().cpu(), rows, self._scale_layout)

    def _integers(self, params: QuantParams, widths: NDArray[np.uint8]) -> Values:
        """The zero points that are stored as small integers."""
        if self.zero_point != "coded" or params.zero_point is None:
            return np.zeros(0, np.uint16)
        zero_points = grids.array_of(params.zero_point).astype(np.uint16).reshape(-1)
        if self.scale == "groups":
            return zero_points
        cells, cell_of_group = grids.cells(widths, self.spec)
        values = np.zeros(len(cells), np.uint16)
        values[cell_of_group] = zero_points
        return values

    def _floats(self, params: QuantParams, widths: NDArray[np.uint8]) -> bytes:
        if self.scale == "groups":
            plain = params.zero_point if self.zero_point == "plain" else None
            return b"".join(bytes_of(value) for value in (params.scale, params.offset, plain) if value is not None)
        shape = grids.by_range(widths.shape, self.spec)
        extents = find_extents(params.scale.numpy().reshape(shape), widths.reshape(shape))
        if extents is None:
            raise PackedFileError("the extents of some rows are not those of the whole weight")
        offsets = b"" if params.offset is None else bytes_of(params.offset.reshape(shape)[:, :1])
        return extents.tobytes() + offsets

    def _scale_shape(self, rows: int) -> tuple[int, int]:
        layout = self._scale_layout
        return (1, 1) if layout.kind == "tensor" else (rows, layout.shape[1])

    def integer_widths(self, widths: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
        """The width of its group for each zero point."""
        if self.zero_point != "coded":
            return np.zeros(0, np.uint8)
        if self.scale == "extents":
            return grids.cells(widths, self.spec)[0]
        return np.broadcast_to(widths, self._scale_shape(rows)).reshape(-1)

    def float_bytes(self, rows: int) -> int:
        """Scales, offsets and plain zero points."""
        size = self.scale_dtype.itemsize * (2 if self.zero_point == "none" else 1)
        if self.scale == "extents":
            return size * (1 if self._range_layout.kind == "tensor" else rows)
        groups_R, groups_C = self._scale_shape(rows)
        return groups_R * groups_C * (size + 4 * (self.zero_point == "plain"))

    def weight_rows(self, part: DecodedPart, out: NDArray[np.float32] | None = None) -> Tensor | None:
        """``(level - zero_point) * scale``, or ``level * scale + offset`` on the float grid."""
        with np.errstate(all="ignore"):  # infinite scales are the file's to have
            in_place = out is None or out.flags.c_contiguous
            if self.scale_dtype != torch.float32 or not (in_place and self._one_grid_for_a_group()) or extension.kernels() is None:
                return self._exact_rows(part.assembled())
            rows = np.empty((part.rows, self._layout.columns), np.float32) if out is None else out
            follows_from_width = self.scale == "extents" and self._range_layout.kind == "tensor"
            part.fill(self._grid_by_width(part) if follows_from_width else self._grid(self._params(part), part.widths), rows)
        return torch.from_numpy(rows) if out is None else None

    def _one_grid_for_a_group(self) -> bool:
        """Whether all weights of a group of bits have one scale."""
        return self._scale_layout.shape[1] == 1 or self._scale_layout.block == self._layout.block

    def _exact_rows(self, part: PartCodes) -> Tensor:
        """The weights of a part as the stored weight computes them: where there is no kernel for it."""
        params, layout = self._params(part), self._scale_layout
        layout = GroupLayout(len(part.codes), self._layout.columns, layout.kind, layout.block)
        return functional.dequantize(torch.from_numpy(self._levels(part, params).astype(np.int32)), params, layout)

    def _grid_by_width(self, part: DecodedPart) -> Grid:
        """The grid of a part whose scales and zero points follow from the width alone."""
        widths = part.present
        found = self._grid(self._params(replace(part, widths=widths[None]), (1, len(widths))), widths[None])

        def by_width(values: NDArray[Any] | None) -> NDArray[Any] | None:
            if values is None:
                return None
            table = np.zeros(grids.WIDTHS, values.dtype)
            table[widths] = values.reshape(-1)
            return table

        return Grid(*(by_width(values) for values in found))  # type: ignore[arg-type]

    def _grid(self, params: QuantParams, widths: NDArray[np.uint8]) -> Grid:
        """The grid of groups of such widths."""
        shape = tuple(params.scale.shape)
        return Grid(
            grids.array_of(params.scale),
            grids.centres(params, np.broadcast_to(widths, shape)).astype(np.int32),
            None if params.zero_point is None else grids.array_of(params.zero_point),
            None if params.offset is None else grids.array_of(params.offset),
        )

    def _params(self, part: PartCodes | DecodedPart, shape: tuple[int, int] | None = None) -> QuantParams:
        """Scales, zero points and offsets of a part, shape (R, C) of its scales unless given."""
        rows = part.rows
        shape = self._scale_shape(rows) if shape is None else shape
        each = np.broadcast_to(part.widths, shape)
        count = shape[0] * shape[1] if self.scale == "groups" else 1 if self._range_layout.kind == "tensor" else rows
        size = count * self.scale_dtype.itemsize
        scale = tensor_of(part.floats[:size], self.scale_dtype, (count, 1) if self.scale == "extents" else shape)
        offset = zero_point = None
        if self.zero_point == "none":
            offset = tensor_of(part.floats[size : 2 * size], self.scale_dtype, tuple(scale.shape)).expand(shape)
        elif self.zero_point == "plain":
            zero_point = tensor_of(part.floats[size:], torch.int32, shape)
        elif self.zero_point == "middle":
            zero_point = torch.from_numpy(1 << (each.astype(np.int32) - 1))
        else:
            cell = grids.cells(part.widths, self.spec)[1] if self.scale == "extents" else slice(None)
            zero_point = torch.from_numpy(part.integers[cell].astype(np.int32).reshape(shape))
        if self.scale == "extents":
            scale = torch.from_numpy(scales_of(scale.numpy(), each))
        return QuantParams(scale, zero_point, offset)

    def _levels(self, part: PartCodes, params: QuantParams) -> Values:
        """Levels, shape (O, I), in the type of the codes: ``centre + 0, -1, 1, -2, ... mod 2^b``."""
        each, kind = np.broadcast_to(part.widths, tuple(params.scale.shape)), part.codes.dtype
        levels = part.codes >> kind.type(1)
        levels ^= -(part.codes & kind.type(1))  # unsigned: 0, 1, 2, 3 are 0, -1, 1, -2
        levels += self._expand(grids.centres(params, each).astype(kind))
        levels &= self._expand(grids.masks(each, kind))
        return levels

    def restore(self, parts: Iterable[PartCodes]) -> IntegerWeight:
        """The integers of all parts."""
        levels, widths, every = [], [], []
        for part in parts:
            params = self._params(part)
            levels.append(torch.from_numpy(self._levels(part, params).astype(np.int32)))
            widths.append(torch.from_numpy(part.widths))
            every.append(params)
        joined = [self._joined([p[i] for p in every], self._scale_layout) for i in range(3)]
        bits = self._joined(widths, self._layout)
        return IntegerWeight(self.spec, torch.cat(levels), QuantParams(*joined), bits)  # type: ignore[arg-type]

    @staticmethod
    def _joined(values: list[Any], layout: GroupLayout) -> Tensor | None:
        if values[0] is None:
            return None
        return (values[0] if layout.kind == "tensor" else torch.cat(values)).contiguous().clone()

    def _expand(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values per scale group as an array that broadcasts with rows."""
        if values.shape[1] == 1:
            return values
        return np.repeat(values, self._scale_layout.block, axis=1)[:, : self._layout.columns]
