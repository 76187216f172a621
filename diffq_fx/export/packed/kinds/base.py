"""What a packed file must know of one kind of stored weight; everything else in this package works on codes and knows no kind.

A kind turns rows of a stored weight into *codes* (unsigned, each at its group's width), a few *small integers* of known widths and some
raw *floats*, and back. A new kind of storage is one subclass of :class:`PackedWeight`, added to ``KINDS`` in ``__init__.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.kinds.decoded import DecodedPart, PartCodes
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import WeightSpec


class PackedWeight(ABC):
    """One weight of one kind, as far as it must be known before its codes can be read."""

    kind: ClassVar[str]
    """The kind's name in the file."""
    stored_type: ClassVar[type[StoredWeight]]
    """What it packs."""
    entries: int | None = None
    """Number of different codes, where a kind has so many: none is above, and all are of the width that the highest needs."""
    common: tuple[torch.dtype, tuple[int, ...]] | None = None
    """Type and shape of the tensor that all parts need, such as a codebook, where a kind has one; it is stored by itself."""

    def __init__(self, spec: WeightSpec) -> None:
        self.spec = spec

    @property
    @abstractmethod
    def layout(self) -> GroupLayout:
        """Rows and columns of the codes, and which of them share a width."""

    @property
    @abstractmethod
    def description(self) -> str:
        """A few words for a table."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the file's header must say beyond the spec, as JSON."""

    @classmethod
    @abstractmethod
    def of_stored(cls, stored: Any) -> "PackedWeight":
        """Decide how to pack a weight.

        Raises:
            PackedFileError: it holds values that the format cannot.
        """

    @classmethod
    @abstractmethod
    def of_facts(cls, spec: WeightSpec, facts: Mapping[str, Any]) -> "PackedWeight":
        """Undo :meth:`facts`.

        Raises:
            PackedFileError: a fact is missing or not possible.
        """

    def common_of(self, stored: Any) -> Tensor | None:
        """The tensor that all parts need."""
        return None

    def set_common(self, tensor: Tensor) -> None:
        """Take that tensor; comes before any :meth:`weight_rows` and :meth:`restore`."""
        raise NotImplementedError(f"{self.kind} has no common tensor")

    def check_widths(self, widths: NDArray[np.uint8]) -> None:
        """Refuse widths that its codes cannot have.

        Raises:
            PackedFileError: one of them is not the one that ``entries`` asks for.
        """
        if self.entries is not None and (widths != max((self.entries - 1).bit_length(), 1)).any():
            raise PackedFileError(f"codes of {int(widths.max())} bits do not index {self.entries} entries")

    @abstractmethod
    def encode(self, stored: Any, rows: slice) -> PartCodes:
        """The codes of some rows."""

    @abstractmethod
    def integer_widths(self, widths: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
        """Widths of the small integers of a part of so many rows whose groups have ``widths``, shape (n,)."""

    @abstractmethod
    def float_bytes(self, rows: int) -> int:
        """Bytes of the floats of a part of so many rows."""

    @abstractmethod
    def weight_rows(self, part: DecodedPart, out: NDArray[np.float32] | None = None) -> Tensor | None:
        """The float weight of a part, bit for bit what the stored weight computes.

        Args:
            part: rows of the weight.
            out: where to put them, shape (O, I); None to get a new tensor.

        Returns:
            Shape (O, I) in the dtype that the weight is computed in; None if it is in ``out``, which is ignored for other dtypes.
        """

    @abstractmethod
    def restore(self, parts: Iterable[PartCodes]) -> StoredWeight:
        """The stored weight of all its parts, in order."""

    def group_rows(self, values: Any, rows: slice, layout: GroupLayout) -> Any:
        """The values per group (R, C) that belong to some rows."""
        return values if layout.kind == "tensor" else values[rows]

    def widths_shape(self, rows: int) -> tuple[int, int]:
        """Shape (R, C) of the widths of so many rows."""
        return (1, 1) if self.layout.kind == "tensor" else (rows, self.layout.shape[1])
