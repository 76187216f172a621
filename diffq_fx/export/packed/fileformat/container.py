"""The container: a safetensors file (8 bytes of length, a JSON header, the tensors' bytes one after the other) that guards every byte.

What the header says of the tensors beyond their places is JSON again, deflated, in the last tensor but one, and holds their checksums. The
last tensor, of 4 bytes, is the CRC-32 of everything before the tensors and of these contents.
Reading checks all that a header says against the file's size before anything of a declared size is allocated.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeGuard

from diffq_fx.atomic import replaced_atomically
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.fileformat.dtypes import TENSOR_TYPES

RESERVED = "diffq_fx/"
"""Tensors whose names begin so are not the model's."""
FORMAT = "diffq_fx.packed"
VERSION = 1

_CONTENTS, _CHECKSUM = RESERVED + "contents", RESERVED + "header_crc32"
_LENGTH, _CRC = struct.Struct("<Q"), struct.Struct("<I")
_MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
_ROOM_FOR_CONTENTS = 1 << 20  # bytes that they may have when inflated, whatever the size of the file
_RAW_DEFLATE = -15
_LARGEST_SIDE = 1 << 48
MOST_SIDES = 64
"""Dimensions of a tensor."""

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Entry:
    """One tensor of the container."""

    dtype: str
    """Name of its type in safetensors."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the first byte of the first tensor."""
    stop: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stop - self.start


def write_container(path: Path, tensors: Sequence[tuple[str, str, Sequence[int], bytes]], contents: Mapping[str, Any]) -> None:
    """Write a container.

    Args:
        path: where to.
        tensors: name, type, shape and bytes of each.
        contents: what else is to be said of them, as JSON.

    Raises:
        PackedFileError: the file cannot be written; the old one is as it was.
    """
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    packed = _deflated(json.dumps(contents, separators=(",", ":")).encode(), sum(len(data) for *_, data in tensors))
    at = 0
    for name, dtype, shape, data in [*tensors, (_CONTENTS, "U8", [len(packed)], packed), (_CHECKSUM, "U8", [4], bytes(4))]:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = _LENGTH.pack(len(text)) + text
    with replaced_atomically(path, PackedFileError) as file:
        file.write(head)
        for *_, data in tensors:
            file.write(data)
        file.write(packed)
        file.write(_CRC.pack(zlib.crc32(packed, zlib.crc32(head))))


def _deflated(text: bytes, file_bytes: int) -> bytes:
    """Text as a raw deflate stream; no shorter than the text where the file would not have as many bytes as a reader asks for."""
    coder = zlib.compressobj(9 if len(text) <= max(_ROOM_FOR_CONTENTS, file_bytes) else 0, zlib.DEFLATED, _RAW_DEFLATE)
    return coder.compress(text) + coder.flush()


def _inflated(data: bytes, file_bytes: int) -> bytes:
    """Undo :func:`_deflated`; what it gives has no more bytes than the file, or a MiB."""
    coder, room = zlib.decompressobj(_RAW_DEFLATE), max(_ROOM_FOR_CONTENTS, file_bytes)
    try:
        text = coder.decompress(data, room)
    except zlib.error as error:
        raise PackedFileError(f"is damaged: its contents cannot be inflated ({error})") from error
    if not coder.eof or coder.unused_data:
        raise PackedFileError(f"is damaged: its contents do not end, or have more than {room} bytes when inflated")
    return text


class Container:
    """An open container whose header has been checked; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open and check a file.

        Raises:
            PackedFileError: it cannot be opened, is of another kind or version, or is damaged.
        """
        self._lock = Lock()
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise PackedFileError(f"cannot be opened: {error.strerror or error}") from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.header_size = self._read_length()
            self.entries, self.contents = self._read_header()
        except OSError as error:
            self._file.close()
            raise PackedFileError(f"cannot be read: {error.strerror or error}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` to ``stop``, counted from the first byte of the first tensor; from any thread.

        Raises:
            PackedFileError: the file has become shorter, or cannot be read.
        """
        return self._read(_LENGTH.size + self.header_size + start, stop - start)

    def _read(self, start: int, count: int) -> bytes:
        try:
            with self._lock:
                self._file.seek(start)
                data = self._file.read(count)
        except OSError as error:
            raise PackedFileError(f"cannot be read: {error.strerror or error}") from error
        if len(data) != count:
            raise PackedFileError(f"is cut short: expected {count} bytes at {start}, got {len(data)}")
        return data

    def _read_length(self) -> int:
        begin = self._read(0, min(self.size, _LENGTH.size + 1))
        length = _LENGTH.unpack(begin[:-1])[0] if len(begin) > _LENGTH.size else -1
        if begin[-1:] == b"{" and 2 <= length <= min(self.size - _LENGTH.size, _MOST_HEADER_BYTES):
            return length
        if begin.startswith(_PICKLES):
            raise PackedFileError("is a pickle (as torch.save writes it), not a packed file; a pickle can run code, so it was not opened")
        raise PackedFileError(f"is not a packed file, or is damaged: its {self.size} bytes do not begin with the length of a header")

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, Any]]:
        head = self._read(0, _LENGTH.size + self.header_size)
        header = _parse(head[_LENGTH.size :])
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            known = "is a safetensors file without what save_packed adds to one: read it with safetensors.torch.load_file"
            raise PackedFileError(known if b'"data_offsets"' in head else "is not a packed file, or is damaged")
        if metadata.get("version") != str(VERSION):
            raise PackedFileError(
                f"has the format version {metadata.get('version')!r}, or is damaged; this diffq_fx reads version {VERSION}"
            )
        entries = self._checked_entries(header)
        contents, checksum = entries.pop(_CONTENTS, None), entries.pop(_CHECKSUM, None)
        if contents is None or checksum is None or checksum.size != _CRC.size:
            raise PackedFileError("is damaged: it has no contents, or no checksum of its header")
        packed = self.read(contents.start, contents.stop)
        if self.read(checksum.start, checksum.stop) != _CRC.pack(zlib.crc32(packed, zlib.crc32(head))):
            raise PackedFileError("is damaged: the checksum of its header does not fit")
        return entries, _parse(_inflated(packed, self.size))

    def _checked_entries(self, header: Mapping[str, Any]) -> dict[str, Entry]:
        """The tensors, which must follow each other without a gap up to the end of the file."""
        entries = {name: _entry(name, value) for name, value in header.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise PackedFileError(f"is damaged: tensor '{name}' begins at byte {entry.start}, expected {at}")
            at = entry.stop
        expected = self.size - _LENGTH.size - self.header_size
        if at != expected:
            raise PackedFileError(f"is damaged or cut short: its tensors end at byte {at} of {expected}")
        return entries


def _parse(text: bytes) -> dict[str, Any]:
    """JSON that is an object without double names.

    Raises:
        PackedFileError: it is not.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"is not a packed file, or is damaged: its header is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise PackedFileError("is not a packed file, or is damaged: its header is not a JSON object")
    return value


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ValueError(f"the name {name[:100]!r} occurs twice")
        names[name] = value
    return names


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _entry(name: str, value: Any) -> Entry:
    """One tensor's facts, the number of its bytes checked against its shape."""
    fields = value if isinstance(value, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not is_integers(shape, _LARGEST_SIDE) or not is_integers(offsets, _LARGEST_SIDE) or len(shape) > MOST_SIDES:
        raise PackedFileError(f"is damaged: tensor '{name[:100]}' has shape {str(shape)[:100]} and bytes {str(offsets)[:100]}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise PackedFileError(f"is damaged: tensor '{name[:100]}' has bytes {str(offsets)[:100]}")
    try:
        size = TENSOR_TYPES.parse(fields.get("dtype")).itemsize * math.prod(shape)
    except PackedFileError as error:
        raise PackedFileError(f"is damaged: tensor '{name[:100]}': {error}") from error
    if size != offsets[1] - offsets[0]:
        raise PackedFileError(f"is damaged: tensor '{name}' of {fields['dtype']} {shape} has {offsets[1] - offsets[0]} bytes, not {size}")
    return Entry(fields["dtype"], tuple(shape), offsets[0], offsets[1])


def is_integers(value: Any, limit: int) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of whole numbers from 0 up to and without ``limit``.

    Example:
        >>> is_integers([1, 2], 3), is_integers([True], 3), is_integers([3], 3), is_integers(None, 3)
        (True, False, False, False)
    """
    return isinstance(value, list) and all(type(each) is int and 0 <= each < limit for each in value)


def looks_packed(path: Path) -> bool:
    """Whether a file begins as a safetensors file does; its contents are not checked.

    Example:
        >>> looks_packed(Path(__file__))
        False
    """
    try:
        with path.open("rb") as file:
            begin = file.read(_LENGTH.size + 1)
    except OSError:
        return False
    return len(begin) > _LENGTH.size and begin[-1:] == b"{" and _LENGTH.unpack(begin[:-1])[0] <= _MOST_HEADER_BYTES
