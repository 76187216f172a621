"""The kind "integer": levels on a grid, with their scales and zero points.

A code is the residue ``(level - centre) mod 2^b``, taken as a number of ``[-2^(b-1), 2^(b-1))`` and folded to 0, -1, 1, -2, 2, ... in
this order, where the centre is the zero point, rounded up, or on the float grid the level nearest to zero. The residue knows no zero
point, so rows of all zero points share one model; it takes no more values than the level itself; and its low bits, the sign first, tell
hardly anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx import functional
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed import integer_scales as grids
from diffq_fx.export.packed.bitplanes import Values, narrow
from diffq_fx.export.packed.dtypes import FLOAT_TYPES, bytes_of, tensor_of
from diffq_fx.export.packed.unpacking import DecodedPart, Grid, fill_in_order
from diffq_fx.export.packed.weight_kind import PackedWeight, PartCodes, expanded
from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import GroupLayout, rows_of
from diffq_fx.kernels import extension
from diffq_fx.storage import IntegerWeight
from diffq_fx.storage.packing import unpack_rows
from diffq_fx.weights import WeightSpec

_SCALES = ("groups", "extents")
_ZERO_POINTS = ("none", "middle", "coded", "plain")
_HALF_ZERO_POINTS = ("centre", "halves")


class PackedIntegers(PackedWeight):
    """An :class:`~diffq_fx.storage.IntegerWeight`.

    Facts:
        scale_dtype: type of scales and offsets.
        scale: "groups", one for each group; or "extents", ``extent / (2^b - 1)`` of each range.
        zero_point: "none", on the float grid; "middle", ``2^(b - 1)``; "coded", small integers of b bits; "plain", int32 (on the grid
            "half" float32) among the floats. On the grid "half" also "centre", ``(2^b - 1) / 2``, and "halves", doubled, of b + 1 bits.
            Where scales are "extents", there is one zero point for each range and width in it.
    """

    kind: ClassVar[str] = "integer"
    stored_type = IntegerWeight

    def __init__(self, spec: WeightSpec, scale_dtype: torch.dtype, scale: str, zero_point: str) -> None:
        super().__init__(spec, spec.bits_layout)
        self.scale_dtype = scale_dtype
        self.zero_point = zero_point
        self._has_extents = scale == "extents"

    @property
    def description(self) -> str:
        """Its groups and grid."""
        return f"{self.spec.group_size}, {self.spec.grid}"

    def facts(self) -> dict[str, Any]:
        """Where scales and zero points come from."""
        return {"scale_dtype": FLOAT_TYPES.name(self.scale_dtype), "scale": _SCALES[self._has_extents], "zero_point": self.zero_point}

    @classmethod
    def of_facts(cls, spec: WeightSpec, facts: Mapping[str, Any]) -> "PackedIntegers":
        """Check the facts against each other and the spec."""
        scale, zero_point = facts.get("scale"), facts.get("zero_point")
        if scale not in _SCALES or zero_point not in _ZERO_POINTS + _HALF_ZERO_POINTS * (spec.grid == "half"):
            raise PackedFileError(f"scale {scale!r} and zero_point {zero_point!r} are not known")
        dtype = FLOAT_TYPES.parse(facts.get("scale_dtype"))
        if scale == "extents" and (zero_point == "plain" or not grids.may_have_extents(spec, dtype)):
            raise PackedFileError("its scales cannot be extents")
        return cls(replace(spec, scale_dtype=dtype) if dtype == torch.float16 else spec, dtype, scale, zero_point)

    @classmethod
    def of_stored(cls, stored: IntegerWeight) -> "PackedIntegers":
        """Choose the smallest form of scales and zero points that gives them back exactly."""
        spec, params = stored.spec, _params_of(stored)
        for name, layout in (("scale", spec.scale_layout), ("bits", spec.bits_layout)):
            found = tuple(getattr(stored, name).shape)
            if found != layout.shape:
                raise PackedFileError(f"{name} has the shape {found}, the spec says {layout.shape}")
        expected = torch.float32 if spec.grid == "half" else torch.int32
        if params.zero_point is not None and params.zero_point.dtype != expected:
            raise PackedFileError(f"zero_point is {params.zero_point.dtype}, the grid {spec.grid!r} has {expected}")
        widths = grids.array_of(stored.bits)
        if not ((widths >= 1) & (widths <= 16)).all():
            raise PackedFileError(f"widths must be from 1 to 16 bits, got {int(widths.min())} to {int(widths.max())}")
        widths = np.broadcast_to(widths, tuple(params.scale.shape))
        zero_point = grids.zero_point_form(params.zero_point, widths)
        if zero_point != "plain" and grids.may_have_extents(spec, params.scale.dtype):
            packed = cls(spec, params.scale.dtype, "extents", zero_point)
            if packed._gives_back(params, widths):
                return packed
        return cls(spec, params.scale.dtype, "groups", zero_point)

    def _gives_back(self, params: QuantParams, widths: NDArray[np.uint8]) -> bool:
        """Whether what it would store of all rows gives these scales, zero points and offsets, bit by bit."""
        if (floats := self._floats(params, widths)) is None:
            return False
        found = self._params(self._integers(params, widths), floats, len(widths), widths)
        before, after = ([None if value is None else bytes_of(value) for value in each] for each in (params, found))
        return before == after

    def encode(self, stored: IntegerWeight, rows: slice) -> PartCodes:
        """Residues, zero points and scales of some rows."""
        levels = unpack_rows(stored.levels, stored.container_bits, self.spec.columns, rows).cpu().numpy()
        widths, params = rows_of(grids.array_of(stored.bits), rows), _params_of(stored).of_rows(rows)
        each = np.broadcast_to(widths, tuple(params.scale.shape))
        if (levels >> self._expand(each.astype(np.int32))).any():
            raise PackedFileError("a level does not fit the width of its group")
        residues = levels - self._expand(grids.centres(params, each).astype(np.int32))
        half = self._expand(1 << (each.astype(np.int32) - 1))
        residues = ((residues + half) & (2 * half - 1)) - half
        codes = residues << 1 ^ residues >> 31  # of int32: 2 r, or below zero -2 r - 1
        if (floats := self._floats(params, each)) is None:
            raise PackedFileError("the extents of some rows are not those of the whole weight")
        return PartCodes(narrow(codes, int(widths.max())), widths, self._integers(params, each), floats)

    def _integers(self, params: QuantParams, widths: NDArray[np.uint8]) -> Values:
        """The zero points that are stored as small integers."""
        if not self._times:
            return np.zeros(0, np.uint16)
        zero_points = (self._times * grids.array_of(params.zero_point)).astype(np.uint16).reshape(-1)
        if not self._has_extents:
            return zero_points
        cells, cell_of_group = grids.cells(widths, self.spec)
        values = np.zeros(len(cells), np.uint16)
        values[cell_of_group] = zero_points
        return values

    def _floats(self, params: QuantParams, widths: NDArray[np.uint8]) -> bytes | None:
        """Scales, offsets and plain zero points as they are stored; None if there are no extents for them."""
        if not self._has_extents:
            plain = params.zero_point if self.zero_point == "plain" else None
            return b"".join(bytes_of(value) for value in (params.scale, params.offset, plain) if value is not None)
        shape = grids.by_range(widths.shape, self.spec)
        extents = grids.find_extents(params.scale.numpy().reshape(shape), widths.reshape(shape))
        if extents is None:
            return None
        return extents.tobytes() + (b"" if params.offset is None else bytes_of(params.offset.reshape(shape)[:, :1]))

    def _scale_shape(self, rows: int) -> tuple[int, int]:
        return self.spec.scale_layout.of_rows(slice(0, rows)).shape

    def _number_of_scales(self, rows: int) -> int:
        """Scales that are stored for so many rows."""
        return (self.spec.range_layout if self._has_extents else self.spec.scale_layout).of_rows(slice(0, rows)).num_groups

    @property
    def _times(self) -> int:
        """What makes zero points small integers; 0 where none are stored so."""
        return {"coded": 1, "halves": 2}.get(self.zero_point, 0)

    @property
    def _zero_point_dtype(self) -> torch.dtype:
        return torch.float32 if self.spec.grid == "half" else torch.int32

    def integer_widths(self, widths: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
        """The width of its group for each zero point, a bit more where they are doubled."""
        if not self._times:
            return np.zeros(0, np.uint8)
        if self.zero_point == "halves" and (widths > grids.WIDEST_HALVES).any():
            raise PackedFileError(f"half-integer zero points of more than {grids.WIDEST_HALVES} bits")
        each = grids.cells(widths, self.spec)[0] if self._has_extents else np.broadcast_to(widths, self._scale_shape(rows)).reshape(-1)
        return each + np.uint8(self._times - 1)

    def float_bytes(self, rows: int) -> int:
        """Scales, offsets and plain zero points."""
        each = self.scale_dtype.itemsize * (2 if self.zero_point == "none" else 1) + 4 * (self.zero_point == "plain")
        return self._number_of_scales(rows) * each

    def weight_rows(self, part: DecodedPart, out: NDArray[np.float32] | None = None) -> Tensor | None:
        """``(level - zero_point) * scale``, or ``level * scale + offset`` on the float grid."""
        scales = self.spec.scale_layout
        one_grid_for_a_group = scales.shape[1] == 1 or scales.block == self.layout.block
        in_place = out is None or out.flags.c_contiguous
        with np.errstate(all="ignore"):  # infinite scales are the file's to have
            is_fast = self.scale_dtype == torch.float32 and self.zero_point != "plain"
            if not (is_fast and in_place and one_grid_for_a_group) or extension.kernels() is None:
                params = self._params_of(part)
                levels = torch.from_numpy(self._levels(part, params).astype(np.int32))
                return functional.dequantize(levels, params, scales.of_rows(slice(0, part.rows)))
            rows = np.empty((part.rows, self.layout.columns), np.float32) if out is None else out
            fill_in_order(part.streams, part.first, part.grouping, self._grid(part), rows)
        return torch.from_numpy(rows) if out is None else None

    def _grid(self, part: DecodedPart) -> Grid:
        """The grid of each group, or of each width where scales and zero points follow from that alone."""
        by_width = self._has_extents and self.spec.range_layout.kind == "tensor"
        widths = part.present[None] if by_width else part.widths
        each = widths if by_width else np.broadcast_to(widths, self._scale_shape(part.rows))
        params = self._params(part.integers, part.floats, part.rows, each)
        scale, zero_point, offset = (None if value is None else grids.array_of(value) for value in params)
        middle = None if zero_point is None else zero_point.astype(np.float32)
        grid = scale, grids.centres(params, each).astype(np.int32), middle, offset
        return Grid(*((None if value is None else _by_width(part.present, value)) if by_width else value for value in grid))  # type: ignore[arg-type]

    def _params_of(self, part: DecodedPart) -> QuantParams:
        each = np.broadcast_to(part.widths, self._scale_shape(part.rows))
        return self._params(part.integers, part.floats, part.rows, each)

    def _params(self, integers: Values, floats: bytes, rows: int, widths: NDArray[np.uint8]) -> QuantParams:
        """Scales, zero points and offsets, shape (R, C), of groups of so many rows that have such widths, from what is stored of them."""
        shape, count = widths.shape, self._number_of_scales(rows)
        size = count * self.scale_dtype.itemsize
        stored_shape = (count, 1) if self._has_extents else shape
        scale = tensor_of(floats[:size], self.scale_dtype, stored_shape)
        offset = zero_point = None
        if self.zero_point == "none":
            offset = tensor_of(floats[size : 2 * size], self.scale_dtype, stored_shape).expand(shape)
        elif self.zero_point == "plain":
            zero_point = tensor_of(floats[size:], self._zero_point_dtype, shape)
        elif self.zero_point == "middle":
            zero_point = torch.from_numpy(1 << (widths.astype(np.int32) - 1)).to(self._zero_point_dtype)
        elif self.zero_point == "centre":
            zero_point = torch.from_numpy(grids.masks(widths, np.float32) / 2)
        else:
            cell = grids.cells(widths, self.spec)[1] if self._has_extents else slice(None)
            values = torch.from_numpy(integers[cell].astype(np.int32).reshape(shape))
            zero_point = values / 2 if self._times == 2 else values.to(self._zero_point_dtype)
        if self._has_extents:
            scale = torch.from_numpy(grids.scales_of(scale.numpy(), widths))
        return QuantParams(scale, zero_point, offset)

    def _levels(self, part: DecodedPart, params: QuantParams) -> Values:
        """Levels, shape (O, I), in the type of the codes: ``centre + 0, -1, 1, -2, ... mod 2^b``."""
        each, kind = np.broadcast_to(part.widths, tuple(params.scale.shape)), part.codes.dtype
        levels = part.codes >> kind.type(1)
        levels ^= -(part.codes & kind.type(1))  # unsigned: 0, 1, 2, 3 are 0, -1, 1, -2
        levels += self._expand(grids.centres(params, each).astype(kind))
        levels &= self._expand(grids.masks(each, kind))
        return levels

    def restore(self, parts: Sequence[DecodedPart]) -> IntegerWeight:
        """The integers of all parts."""
        params = [self._params_of(part) for part in parts]
        levels = torch.cat([torch.from_numpy(self._levels(part, each).astype(np.int32)) for part, each in zip(parts, params, strict=True)])
        bits = _joined([torch.from_numpy(part.widths) for part in parts], self.layout)
        joined = (None if values[0] is None else _joined(values, self.spec.scale_layout) for values in zip(*params, strict=True))
        return IntegerWeight(self.spec, levels, QuantParams(*joined), bits)  # type: ignore[arg-type]

    def _expand(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values per scale group as an array that broadcasts with rows."""
        return expanded(values, self.spec.scale_layout)


def _params_of(stored: IntegerWeight) -> QuantParams:
    return QuantParams(stored.scale, stored.zero_point, stored.offset).map(lambda values: values.detach().cpu())


def _by_width(widths: NDArray[np.uint8], values: NDArray[Any]) -> NDArray[Any]:
    table = np.zeros(grids.WIDTHS, values.dtype)
    table[widths] = values.reshape(-1)
    return table


def _joined(values: Sequence[Any], layout: GroupLayout) -> Tensor:
    return (values[0] if layout.kind == "tensor" else torch.cat(list(values))).contiguous().clone()
