"""Names of types in the file, and tensors as bytes."""

import sys
from typing import Any

import torch
from torch import Tensor

from diffq_fx.errors import PackedFileError


class TypeNames(dict[str, torch.dtype]):
    """Types that the file may hold in some place, by their names there."""

    def name(self, dtype: torch.dtype) -> str:
        """Name of a type; an error if the file cannot hold it."""
        for name, each in self.items():
            if each == dtype:
                return name
        raise PackedFileError(f"the type {dtype} cannot be stored; {', '.join(self)} can")

    def parse(self, name: Any) -> torch.dtype:
        """The type of a name; an error if it is none of the names."""
        if not isinstance(name, str) or name not in self:
            raise PackedFileError(f"expected one of the types {', '.join(self)}, got {name!r}")
        return self[name]


FLOAT_TYPES = TypeNames({str(each).removeprefix("torch."): each for each in (torch.float32, torch.float16, torch.bfloat16, torch.float64)})
"""Types of quantized weights and their scales, by the name that torch gives them."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_RARE = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}

TENSOR_TYPES = TypeNames({**_FLOATS, **_INTEGERS, "BOOL": torch.bool, **_RARE, "C64": torch.complex64})
"""Types of whole tensors, by their name in safetensors."""


def can_stand_for(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a file may keep a tensor in a smaller type: float32 as float16, int32 or int64 as integers of fewer bits."""
    if dtype in (torch.int32, torch.int64) and stored in (*_INTEGERS.values(), torch.uint16):
        return stored.itemsize < dtype.itemsize
    return (stored, dtype) == (torch.float16, torch.float32)


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's values, row by row, little endian."""
    _refuse_big_endian()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`bytes_of`; the tensor is a copy. A bool that is neither 0 nor 1 is an error."""
    _refuse_big_endian()
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if dtype == torch.bool and int(raw.max()) > 1:
        raise PackedFileError(f"a bool is stored as {int(raw.max())}")
    return raw.view(dtype).reshape(shape)


def _refuse_big_endian() -> None:
    if sys.byteorder != "little":
        raise PackedFileError("packed files are read and written on little endian machines only")
