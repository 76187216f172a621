"""Names of types in the file, and tensors as bytes."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffq_fx.errors import PackedFileError


class TypeNames:
    """A set of torch dtypes and their names."""

    def __init__(self, names: Mapping[str, torch.dtype]) -> None:
        self._types = dict(names)
        self._names = {dtype: name for name, dtype in names.items()}

    def __contains__(self, dtype: torch.dtype) -> bool:
        return dtype in self._names

    def name(self, dtype: torch.dtype) -> str:
        """Name of a type.

        Raises:
            PackedFileError: the file format has no such type.
        """
        if dtype not in self._names:
            raise PackedFileError(f"the type {dtype} cannot be stored; {', '.join(self._types)} can")
        return self._names[dtype]

    def parse(self, name: Any) -> torch.dtype:
        """The type of a name.

        Raises:
            PackedFileError: it is not one of the names.
        """
        if not isinstance(name, str) or name not in self._types:
            raise PackedFileError(f"expected one of the types {', '.join(self._types)}, got {name!r}")
        return self._types[name]


FLOAT_TYPES = TypeNames({"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64})
"""Types of quantized weights and their scales, by the name that torch gives them."""

TENSOR_TYPES = TypeNames(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "C64": torch.complex64,
    }
)
"""Types of whole tensors, by their name in safetensors."""


_INTEGERS = {each: torch.iinfo(each) for each in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)}


def can_stand_for(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a file may keep a tensor in a smaller type: float32 as float16, int32 or int64 as integers of fewer bits.

    Example:
        >>> can_stand_for(torch.uint16, torch.int64), can_stand_for(torch.int64, torch.uint8)
        (True, False)
    """
    if dtype in (torch.int32, torch.int64) and stored in _INTEGERS:
        return _INTEGERS[stored].bits < _INTEGERS[dtype].bits
    return (stored, dtype) == (torch.float16, torch.float32)


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's values, row by row, little endian.

    Example:
        >>> bytes_of(torch.tensor([1, 258], dtype=torch.int16)).hex()
        '01000201'
    """
    _refuse_big_endian()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`bytes_of`; the tensor is a copy.

    Raises:
        PackedFileError: a bool is neither 0 nor 1.
    """
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
