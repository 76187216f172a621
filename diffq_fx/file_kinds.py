"""What a file is by its first bytes, so that whoever was given another kind than it reads says which, and what to do."""

import os
import string
import struct
import zipfile
from pathlib import Path

_SAFETENSORS_LENGTH = struct.Struct("<Q")
MOST_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""
_BEGIN = 512
_ZIP, _PICKLES = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_TEXT = frozenset(string.printable)
_PICKLE = "is a pickle (as torch.save writes it), which can run code and was not opened: load it in Python, and write safetensors or ONNX"


def looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does, as packed files do too; its contents are not checked."""
    begin = _begin(path)[: _SAFETENSORS_LENGTH.size + 1]
    return begin[_SAFETENSORS_LENGTH.size :] == b"{" and _SAFETENSORS_LENGTH.unpack(begin[:-1])[0] <= MOST_HEADER_BYTES


def foreign_kind(path: str | Path) -> str:
    """What a path leads to that is certainly neither ONNX nor safetensors, and what to do: a sentence's end; empty if it is unknown.

    Example:
        >>> import tempfile
        >>> foreign_kind(tempfile.gettempdir())
        'is a folder: give a file in it (a Hugging Face folder is for diffq-fx compress, a compressed one for from_pretrained)'
    """
    if os.path.isdir(path):
        return "is a folder: give a file in it (a Hugging Face folder is for diffq-fx compress, a compressed one for from_pretrained)"
    if os.path.isfile(path) and not os.path.getsize(path):
        return "is empty: it has 0 bytes"
    if looks_like_safetensors(Path(path)):  # the length that it begins with may have the bytes of a pickle
        return ""
    begin = _begin(Path(path))
    if begin.startswith(_ZIP):
        return _kind_of_archive(Path(path))
    if begin.startswith(_PICKLES):
        return _PICKLE
    if begin.startswith(b"version https://git-lfs"):
        return "is a pointer to a file that git-lfs has not fetched: run git lfs pull"
    if begin.startswith(b"GGUF"):
        return "is a GGUF file, which diffq_fx does not read"
    return "is a text file" if len(begin) > _SAFETENSORS_LENGTH.size and _is_text(begin) else ""


def _begin(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_BEGIN)
    except (OSError, ValueError):  # whoever opens it says so
        return b""


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return "is a zip archive that was cut short"
    if "constants.pkl" in names:
        return "is a model of torch.jit: compress the nn.Module that it was made of, and export that"
    if names & {"archive_format", "serialized_exported_program.json"}:
        return "is a program of torch.export: compress the nn.Module that it was made of, and export that"
    return _PICKLE if "data.pkl" in names else "is a zip archive: give a file in it"


def _is_text(begin: bytes) -> bool:
    try:
        text = begin.decode()
    except UnicodeDecodeError as error:
        if error.start < len(begin) - 3:  # else a character that the excerpt cuts
            return False
        text = begin[: error.start].decode()
    return all(each in _TEXT or not each.isascii() for each in text)
