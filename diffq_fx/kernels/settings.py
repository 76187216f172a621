"""What kernels need to know of a weight beside its values; written out where an operator is called, since graphs hold no objects."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from diffq_fx.functional.groups import GroupKind, GroupLayout
from diffq_fx.functional.quantization import Grid

_Settings = TypeVar("_Settings", bound="GroupSettings")
OF_GROUPS = "int axis, str group_kind, int group_block, str range_kind, int range_block, str grid"
OF_NOISE = f"{OF_GROUPS}, bool clips, float min_bits, float max_bits, float gain, bool gaussian"
"""The settings in the schemas of operators."""


@dataclass(frozen=True)
class GroupSettings:
    """The groups of one weight and their grid."""

    axis: int
    """Of the output channels."""
    groups: GroupLayout
    """The groups that share a number of bits; where a weight is rounded, those that share a scale."""
    ranges: GroupLayout
    """The groups that share a range."""
    grid: Grid

    def arguments(self) -> tuple[Any, ...]:
        """The settings as an operator takes them."""
        groups, ranges = self.groups, self.ranges
        return self.axis, groups.kind, groups.block, ranges.kind, ranges.block, self.grid

    @classmethod
    def of(cls: type[_Settings], shape: tuple[int, ...], axis: int, *arguments: Any) -> _Settings:
        """What :meth:`arguments` wrote out, for a weight of this shape."""
        group_kind, group_block, range_kind, range_block, *others = arguments
        rows, columns = shape[axis], math.prod(shape) // shape[axis]
        groups = GroupLayout(rows, columns, cast("GroupKind", group_kind), group_block)
        return cls(axis, groups, GroupLayout(rows, columns, cast("GroupKind", range_kind), range_block), *others)


@dataclass(frozen=True)
class NoiseSettings(GroupSettings):
    """How noise is made of the logits of one weight; see :class:`~diffq_fx.methods.diffq.DiffQConfig` for the settings."""

    clips: bool
    """Whether the range is that of normal weights and not that of the extreme ones."""
    min_bits: float
    max_bits: float
    gain: float
    gaussian: bool

    @property
    def bits(self) -> tuple[float, float, float]:
        """Smallest width, what the largest is more, gain: as kernels take them."""
        return self.min_bits, self.max_bits - self.min_bits, self.gain

    def arguments(self) -> tuple[Any, ...]:
        """The settings as an operator takes them."""
        return *super().arguments(), self.clips, self.min_bits, self.max_bits, self.gain, self.gaussian
