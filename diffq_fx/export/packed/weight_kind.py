"""What a packed file must know of one kind of stored weight; everything else in this package works on codes and knows no kind.

A kind turns rows of a stored weight into *codes* (unsigned, each at its group's width), a few *small integers* of known widths and some
raw *floats*, and back. A new kind of storage is one subclass of :class:`PackedWeight`, added to ``KINDS`` in ``header.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.bitplanes import Values
from diffq_fx.export.packed.unpacking import DecodedPart
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import WeightSpec


class PartCodes(NamedTuple):
    """Consecutive rows of one weight, to be written. Legend: O rows, I columns, (R, C) the groups of those rows."""

    codes: Values  # shape (O, I); the coder gains most where small codes are frequent
    widths: NDArray[np.uint8]  # bits of each group of codes, shape (R, C) of the kind's layout for these rows
    integers: Values = np.zeros(0, np.uint16)  # shape (n,), such as zero points
    floats: bytes = b""  # stored as it is, such as scales


class PackedWeight(ABC):
    """One weight of one kind, as far as it must be known before its codes can be read."""

    kind: ClassVar[str]  # the kind's name in the file
    stored_type: ClassVar[type[StoredWeight]]  # what it packs
    entries: int | None = None
    """Number of different codes, where a kind has so many: none is above, and all are of the width that the highest needs."""
    common_type: tuple[torch.dtype, tuple[int, ...]] | None = None
    """Type and shape of the tensor that all parts need, such as a codebook, where a kind has one; it is stored by itself."""
    common: Tensor  # that tensor

    def __init__(self, spec: WeightSpec, layout: GroupLayout) -> None:
        self.spec = spec
        self.layout = layout  # rows and columns of the codes, and which of them share a width

    @property
    @abstractmethod
    def description(self) -> str:
        """A few words for a table."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the file's header must say beyond the spec, as JSON."""

    @classmethod
    @abstractmethod
    def of_facts(cls, spec: WeightSpec, facts: Mapping[str, Any]) -> "PackedWeight":
        """Undo :meth:`facts`; an error if one of them is missing or not possible."""

    @classmethod
    @abstractmethod
    def of_stored(cls, stored: Any) -> "PackedWeight":
        """Decide how to pack a weight; an error if it holds values that the format cannot."""

    @abstractmethod
    def encode(self, stored: Any, rows: slice) -> PartCodes:
        """The codes of some rows."""

    def integer_widths(self, widths: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
        """Widths of the small integers of a part of so many rows whose groups have ``widths``, shape (n,)."""
        return np.zeros(0, np.uint8)

    def float_bytes(self, rows: int) -> int:
        """Bytes of the floats of a part of so many rows."""
        return 0

    @abstractmethod
    def weight_rows(self, part: DecodedPart, out: NDArray[np.float32] | None = None) -> Tensor | None:
        """The float weight of a part, bit for bit what the stored weight computes: shape (O, I) in the dtype that it computes in.

        Where that is float32 it may be put into ``out``, of the same shape, instead: then there is None to return.
        """

    @abstractmethod
    def restore(self, parts: Sequence[DecodedPart]) -> StoredWeight:
        """The stored weight of all its parts, in order."""

    def widths_shape(self, rows: int) -> tuple[int, int]:
        """Shape (R, C) of the widths of so many rows."""
        return self.layout.of_rows(slice(0, rows)).shape

    def check_widths(self, widths: NDArray[np.uint8]) -> None:
        """Refuse widths that are not the one that ``entries`` asks for."""
        if self.entries is not None and (widths != max((self.entries - 1).bit_length(), 1)).any():
            raise PackedFileError(f"codes of {int(widths.max())} bits do not index {self.entries} entries")

    def check_codes(self, part: DecodedPart) -> None:
        """Refuse codes that are no index of an entry, where their width could hold such."""
        if self.entries is not None and (self.entries < 2 or self.entries.bit_count() > 1):
            highest = int(part.codes.max())
            if highest >= self.entries:
                raise PackedFileError(f"a code of '{self.spec.name}' is {highest}, it has {self.entries} entries")


def expanded(values: NDArray[Any], layout: GroupLayout) -> NDArray[Any]:
    """Values per group (R, C) as an array that broadcasts with rows of shape (O, I)."""
    return values if values.shape[1] == 1 else np.repeat(values, layout.block, axis=1)[:, : layout.columns]
