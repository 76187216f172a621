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
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.dtypes import TENSOR_TYPES
from diffq_fx.file_kinds import MOST_HEADER_BYTES

RESERVED = "diffq_fx/"
"""Tensors whose names begin so are not the model's."""
FORMAT = "diffq_fx.packed"
VERSION = 1

_CONTENTS, _CHECKSUM = RESERVED + "contents", RESERVED + "header_crc32"
_LENGTH, _CRC = struct.Struct("<Q"), struct.Struct("<I")
_ROOM_FOR_CONTENTS = 1 << 20  # bytes that they may have when inflated, whatever the size of the file
_RAW_DEFLATE = -15
_FEW = 1 << 16  # bytes that are read at once where nobody needs them together
MOST_BYTES = 1 << 48
MOST_SIDES = 64  # dimensions of a tensor


class Entry(NamedTuple):
    """One tensor of the container: its type by safetensors' name, and its bytes, counted from the first byte of the first tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Source:
    """Some bytes that are taken from the front, with the checksum of those that were: what is done with does not stay in memory."""

    def __init__(self, read: Callable[[int, int], bytes | memoryview], start: int, stop: int, crc32: int = 0) -> None:
        self._read, self._at, self._stop = read, start, stop
        self.crc32 = crc32

    @property
    def left(self) -> int:
        """Bytes that nobody took."""
        return self._stop - self._at

    def take(self, count: int) -> bytes | memoryview:
        """The next ``count`` bytes; an error if there are fewer."""
        if count > self.left:
            raise PackedFileError(f"it ends early: {count} bytes are wanted, {self.left} are left")
        data = self._read(self._at, self._at + count)
        self._at += count
        self.crc32 = zlib.crc32(data, self.crc32)
        return data

    def skip(self, *, zeros: bool = False) -> None:
        """Take what is left; with ``zeros`` anything else in it is an error."""
        while self.left:
            data = self.take(min(self.left, _FEW))
            if zeros and any(data):
                raise PackedFileError("something is hidden in the zeros that fill up a block")


def container_of(tensors: Sequence[tuple[str, str, Sequence[int], bytes]], contents: Mapping[str, Any]) -> list[bytes]:
    """The bytes of a container, in pieces: of name, type, shape and bytes of each tensor, and what else is to be said of them, as JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    packed = _deflated(json.dumps(contents, separators=(",", ":")).encode(), sum(len(data) for *_, data in tensors))
    at = 0
    for name, dtype, shape, data in [*tensors, (_CONTENTS, "U8", [len(packed)], packed), (_CHECKSUM, "U8", [4], bytes(4))]:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = _LENGTH.pack(len(text)) + text
    return [head, *(data for *_, data in tensors), packed, _CRC.pack(zlib.crc32(packed, zlib.crc32(head)))]


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
    """An open container whose header has been checked; its errors do not name the file, whoever opens it does."""

    def __init__(self, file: BinaryIO) -> None:
        """Check a file; an error if it is of another kind or version, or damaged."""
        self._file, self._lock = file, Lock()
        self.size = file.seek(0, os.SEEK_END)
        begin = self._read(0, min(self.size, _LENGTH.size + 1))
        self._body = _LENGTH.size + _header_size(begin, self.size)
        self.entries, self.described = self._read_header()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from ``start`` to ``stop``, counted from the first byte of the first tensor; from any thread."""
        return self._read(self._body + start, self._body + stop)

    def _read(self, start: int, stop: int) -> bytes:
        try:
            with self._lock:
                self._file.seek(start)
                data = self._file.read(stop - start)
        except OSError as error:
            raise PackedFileError(f"cannot be read: {error.strerror or error}") from error
        if len(data) != stop - start:
            raise PackedFileError(f"is cut short: expected {stop - start} bytes at {start}, got {len(data)}")
        return data

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, Any]]:
        head = self._read(0, self._body)
        header = _parse(head[_LENGTH.size :])
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            known = (
                "is a safetensors file without what save_packed adds to one: read it with safetensors.torch.load_file; if diffq_fx wrote "
                "the Hugging Face folder around it, import diffq_fx.integrations.transformers, load the folder by from_pretrained, and "
                "bits_report(model) says what is in it"
            )
            raise PackedFileError(known if b'"data_offsets"' in head else "is not a packed file, or is damaged")
        if (version := metadata.get("version")) != str(VERSION):
            raise PackedFileError(f"has the format version {version!r}, or is damaged; this diffq_fx reads version {VERSION}")
        entries = {name: _entry(name, value) for name, value in header.items()}
        _check_places(entries, self.size - self._body)
        contents, checksum = entries.pop(_CONTENTS, None), entries.pop(_CHECKSUM, None)
        if contents is None or checksum is None or checksum.stop - checksum.start != _CRC.size:
            raise PackedFileError("is damaged: it has no contents, or no checksum of its header")
        packed = self.read(contents.start, contents.stop)
        if self.read(checksum.start, checksum.stop) != _CRC.pack(zlib.crc32(packed, zlib.crc32(head))):
            raise PackedFileError("is damaged: the checksum of its header does not fit")
        return entries, _parse(_inflated(packed, self.size))


def _header_size(begin: bytes, size: int) -> int:
    """The header's bytes, of a file that begins so and has so many bytes."""
    length = _LENGTH.unpack(begin[:-1])[0] if len(begin) > _LENGTH.size else -1
    if begin[-1:] == b"{" and 2 <= length <= min(size - _LENGTH.size, MOST_HEADER_BYTES):
        return length
    raise PackedFileError(f"is not a packed file, or is damaged: its {size} bytes do not begin with the length of a header")


def _check_places(entries: Mapping[str, Entry], size: int) -> None:
    """Refuse tensors that do not follow each other without a gap up to the end of the file."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise PackedFileError(f"is damaged: tensor '{name}' begins at byte {entry.start}, expected {at}")
        at = entry.stop
    if at != size:
        raise PackedFileError(f"is damaged or cut short: its tensors end at byte {at} of {size}")


def _parse(text: bytes) -> dict[str, Any]:
    """JSON that is an object, without double names and without numbers that are none."""
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
        if b"\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text, and an error
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
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not is_shape(shape, MOST_BYTES) or not is_integers(offsets, MOST_BYTES, 2) or offsets[0] > offsets[1]:
        raise PackedFileError(f"is damaged: tensor '{name[:100]}' has shape {str(shape)[:100]} and bytes {str(offsets)[:100]}")
    try:
        size = TENSOR_TYPES.parse(dtype).itemsize * math.prod(shape)
    except PackedFileError as error:
        raise PackedFileError(f"is damaged: tensor '{name[:100]}': {error}") from error
    if size != offsets[1] - offsets[0]:
        raise PackedFileError(f"is damaged: tensor '{name}' of {dtype} {shape} has {offsets[1] - offsets[0]} bytes, not {size}")
    return Entry(fields["dtype"], tuple(shape), offsets[0], offsets[1])


def is_integers(value: Any, limit: int, count: int | None = None) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of so many whole numbers from 0 up to and without ``limit``."""
    right = isinstance(value, list) and (count is None or len(value) == count)
    return right and all(type(each) is int and 0 <= each < limit for each in value)


def is_shape(value: Any, limit: int) -> TypeGuard[list[int]]:
    """Whether a JSON value is a tensor's shape, each side of it below ``limit``."""
    return is_integers(value, limit) and len(value) <= MOST_SIDES
