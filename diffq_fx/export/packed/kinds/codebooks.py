"""The kind "codebook": codes of weights, or of blocks of weights, and the codebook that they index.

The codebook stands among the floats of every part, so that each part can be read alone; but for weights of more than some hundred
thousand codes there is one part.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding.bitplanes import Values
from diffq_fx.export.packed.fileformat.dtypes import bytes_of, tensor_of
from diffq_fx.export.packed.kinds.base import PackedWeight, PartCodes
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.storage.codebook import CodebookWeight, code_bits, codebook_values
from diffq_fx.weights import WeightSpec

_ENTRY_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_MOST_ENTRIES = 1 << 16
_LONGEST_BLOCK = 1 << 16
_SCALE_BYTES = 4


class PackedCodebook(PackedWeight):
    """A :class:`~diffq_fx.storage.codebook.CodebookWeight`.

    Facts:
        entries: K, entries of the codebook.
        block_size: D, weights that a code stands for.
        entry_dtype: "float32", "float16" or "int8"; an int8 codebook has a float32 scale behind it.
    """

    kind: ClassVar[str] = "codebook"
    stored_type = CodebookWeight

    def __init__(self, spec: WeightSpec, entries: int, block_size: int, entry_dtype: str) -> None:
        super().__init__(spec)
        self.entries, self.block_size, self.entry_dtype = entries, block_size, entry_dtype
        self._layout = GroupLayout.of(spec.rows, -(-spec.columns // block_size), "tensor")

    @property
    def layout(self) -> GroupLayout:
        """Rows and codes of a row, all of one width."""
        return self._layout

    def facts(self) -> dict[str, Any]:
        """The codebook's shape and type."""
        return {"entries": self.entries, "block_size": self.block_size, "entry_dtype": self.entry_dtype}

    @classmethod
    def of_facts(cls, spec: WeightSpec, facts: Mapping[str, Any]) -> "PackedCodebook":
        """Check the facts."""
        found = [facts.get(key) for key in ("entries", "block_size", "entry_dtype")]
        entries, block_size, entry_dtype = found
        counts = ((entries, _MOST_ENTRIES), (block_size, _LONGEST_BLOCK))
        whole = all(type(count) is int and 1 <= count <= most for count, most in counts)
        if not whole or not isinstance(entry_dtype, str) or entry_dtype not in _ENTRY_TYPES:
            raise PackedFileError(f"a codebook of (entries, block_size, entry_dtype) = {tuple(found)} is not possible")
        return cls(spec, entries, block_size, entry_dtype)  # type: ignore[arg-type]

    @classmethod
    def of_stored(cls, stored: CodebookWeight) -> "PackedCodebook":
        """Read off the codebook."""
        names = {dtype: name for name, dtype in _ENTRY_TYPES.items()}
        if stored.codebook.dtype not in names:
            raise PackedFileError(f"a codebook of {stored.codebook.dtype}; the file holds {', '.join(_ENTRY_TYPES)}")
        if (stored.scale is None) == (stored.codebook.dtype == torch.int8):
            raise PackedFileError("an int8 codebook, and no other, has a scale")
        entries, block_size = stored.codebook.shape
        return cls(stored.spec, entries, block_size, names[stored.codebook.dtype])

    @property
    def _width(self) -> int:
        return max(code_bits(self.entries), 1)

    def encode(self, stored: CodebookWeight, rows: slice) -> PartCodes:
        """The codes of some rows, and the codebook."""
        codes = stored.codes_OC()[rows].cpu().numpy().astype(np.uint8 if self._width <= 8 else np.uint16)
        floats = bytes_of(stored.codebook.cpu()) + (b"" if stored.scale is None else bytes_of(stored.scale.cpu()))
        widths = np.full((1, 1), self._width, np.uint8)
        return PartCodes(codes, widths, np.zeros(0, np.uint16), floats + bytes(self.float_bytes(len(codes)) - len(floats)))

    def integer_widths(self, widths: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
        """A codebook has no small integers."""
        return np.zeros(0, np.uint8)

    def float_bytes(self, rows: int) -> int:
        """The codebook and its scale, filled up to an even number of bytes."""
        size = self._codebook_bytes + (_SCALE_BYTES if self.entry_dtype == "int8" else 0)
        return size + size % 2

    @property
    def _codebook_bytes(self) -> int:
        return self.entries * self.block_size * _ENTRY_TYPES[self.entry_dtype].itemsize

    def _codebook(self, part: PartCodes) -> tuple[Tensor, Tensor | None]:
        size = self._codebook_bytes
        codebook = tensor_of(part.floats[:size], _ENTRY_TYPES[self.entry_dtype], (self.entries, self.block_size))
        scale = tensor_of(part.floats[size : size + _SCALE_BYTES], torch.float32, ()) if self.entry_dtype == "int8" else None
        return codebook, scale

    def _checked_codes(self, part: PartCodes) -> Values:
        if int(part.codes.max(initial=0)) >= self.entries or int(part.widths[0, 0]) != self._width:
            raise PackedFileError(f"weight {self.spec.name!r}: a code names an entry that its codebook of {self.entries} does not have")
        return part.codes

    def weight_rows(self, part: PartCodes, out: NDArray[np.float32] | None = None) -> Tensor | None:
        """``codebook[codes]``; what the last block of a row has beyond the row is cut off."""
        codes = torch.from_numpy(self._checked_codes(part).astype(np.int32))
        rows = codebook_values(*self._codebook(part))[codes.long()].reshape(len(codes), -1)[:, : self.spec.columns]
        if out is None:
            return rows
        np.copyto(out, rows.numpy())
        return None

    def restore(self, parts: Iterable[PartCodes]) -> CodebookWeight:
        """The codes of all parts, and the codebook of the first."""
        held = list(parts)
        codes = np.concatenate([self._checked_codes(part).astype(np.int32) for part in held])
        codebook, scale = self._codebook(held[0])
        return CodebookWeight(self.spec, torch.from_numpy(codes), codebook.clone(), None if scale is None else scale.clone())
