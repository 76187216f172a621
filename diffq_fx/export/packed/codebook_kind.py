"""The kind "codebook": one code for each weight or block of weights (product quantization), and the entries that they index.

A code is the index of its entry, and all codes of a weight have one width. The entries are the weight's *common tensor*: every part needs
them, so they lie in the file once.

Shape legend: O rows, I columns, D weights in a block, C = ceil(I / D) blocks in a row, K entries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.bitplanes import narrow
from diffq_fx.export.packed.dtypes import TENSOR_TYPES, TypeNames
from diffq_fx.export.packed.unpacking import DecodedPart
from diffq_fx.export.packed.weight_kind import PackedWeight, PartCodes
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.storage.codebook import CodebookWeight, code_bits, codebook_values
from diffq_fx.storage.packing import unpack_rows
from diffq_fx.weights import WeightSpec

_ENTRY_TYPES = TypeNames({name: TENSOR_TYPES[name] for name in ("F32", "F16", "BF16", "F64", "I8")})
_MOST_ENTRIES = 1 << 16
_MOST_IN_BLOCK = 1 << 40


class PackedCodebook(PackedWeight):
    """A :class:`~diffq_fx.storage.codebook.CodebookWeight`.

    Facts:
        entries: K, 1 to 65536.
        block_size: D.
        entry_dtype: type of the entries, by its name in safetensors.
        scale: what the entries are multiplied by, a float32; absent where they are not.
    """

    kind: ClassVar[str] = "codebook"
    stored_type = CodebookWeight

    def __init__(self, spec: WeightSpec, entries: int, block_size: int, entry_dtype: torch.dtype, scale: float | None) -> None:
        super().__init__(spec, GroupLayout.of(spec.rows, -(-spec.columns // block_size), "tensor"))
        self.entries = entries
        self.common_type = entry_dtype, (entries, block_size)
        self._block_size, self._entry_dtype, self._scale = block_size, entry_dtype, scale

    @property
    def description(self) -> str:
        """Its entries and their type."""
        return f"codebook {self.entries}x{self._block_size} {_ENTRY_TYPES.name(self._entry_dtype)}"

    def facts(self) -> dict[str, Any]:
        """The shape of the codebook, and its scale."""
        facts = {"entries": self.entries, "block_size": self._block_size, "entry_dtype": _ENTRY_TYPES.name(self._entry_dtype)}
        return facts | ({} if self._scale is None else {"scale": self._scale})

    @classmethod
    def of_facts(cls, spec: WeightSpec, facts: Mapping[str, Any]) -> "PackedCodebook":
        """Check the facts; that the codebook has this shape is checked with the tensors."""
        entries, block_size, scale = (facts.get(name) for name in ("entries", "block_size", "scale"))
        if type(entries) is not int or not 1 <= entries <= _MOST_ENTRIES:
            raise PackedFileError(f"its codebook has {str(entries)[:100]} entries, 1 to {_MOST_ENTRIES} are possible")
        if type(block_size) is not int or not 1 <= block_size < _MOST_IN_BLOCK:
            raise PackedFileError(f"its block size {str(block_size)[:100]} is not possible")
        if scale is not None and (type(scale) is not float or not math.isfinite(scale) or torch.tensor(scale).item() != scale):
            raise PackedFileError(f"its scale {str(scale)[:100]} is not a float32")
        return cls(spec, entries, block_size, _ENTRY_TYPES.parse(facts.get("entry_dtype")), scale)

    @classmethod
    def of_stored(cls, stored: CodebookWeight) -> "PackedCodebook":
        """Check that codes and codebook fit each other."""
        codebook, scale = stored.codebook, stored.scale
        if codebook.dim() != 2 or not 1 <= len(codebook) <= _MOST_ENTRIES or not codebook.shape[1]:
            raise PackedFileError(f"its codebook has the shape {tuple(codebook.shape)}, expected (1 to {_MOST_ENTRIES}, 1 or more)")
        if scale is not None and (scale.dtype != torch.float32 or scale.dim() or not math.isfinite(float(scale))):
            raise PackedFileError(f"the scale of its codebook must be one finite float32, got {scale}")
        highest = int(stored.codes_OC().max())
        if highest >= len(codebook):
            raise PackedFileError(f"a code is {highest}, its codebook has {len(codebook)} entries")
        _ENTRY_TYPES.name(codebook.dtype)
        packed = cls(stored.spec, len(codebook), codebook.shape[1], codebook.dtype, None if scale is None else float(scale))
        packed.common = codebook
        return packed

    def encode(self, stored: CodebookWeight, rows: slice) -> PartCodes:
        """The codes of some rows."""
        width = max(code_bits(len(stored.codebook)), 1)
        codes = unpack_rows(stored.codes, stored.container_bits, self.layout.columns, rows)
        return PartCodes(narrow(codes.cpu().numpy(), width), np.full((1, 1), width, np.uint8))

    def _scale_tensor(self) -> Tensor | None:
        return None if self._scale is None else torch.tensor(self._scale, dtype=torch.float32)

    def weight_rows(self, part: DecodedPart, out: NDArray[np.float32] | None = None) -> Tensor | None:
        """``codebook[codes]``."""
        codes, columns = part.codes, self.spec.columns
        values = codebook_values(self.common, self._scale_tensor())[:, :columns].contiguous().numpy()  # a block may be longer than a row
        if out is None or values.dtype != np.float32:
            return torch.from_numpy(values[codes].reshape(len(codes), -1)[:, :columns])
        if codes.shape[1] * values.shape[1] == columns:
            np.take(values, codes, 0, out.reshape(*codes.shape, -1), "clip")  # "raise" would make a copy
        else:
            np.copyto(out, values[codes].reshape(len(codes), -1)[:, :columns])
        return None

    def restore(self, parts: Sequence[DecodedPart]) -> CodebookWeight:
        """The codes of all parts, and the codebook."""
        codes = torch.cat([torch.from_numpy(part.codes.astype(np.int32)) for part in parts])
        return CodebookWeight(self.spec, codes, self.common.clone(), self._scale_tensor())
