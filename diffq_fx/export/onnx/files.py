"""ONNX files as they lie on disk: read without their external data, measured with it, and the tensors' sizes.

Nothing here decodes a tensor, so a file is read as fast as protobuf parses it and no weight is held twice.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffq_fx.arguments import as_path
from diffq_fx.errors import DiffQError
from diffq_fx.file_kinds import foreign_kind, looks_like_safetensors

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto


DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What comes of a damaged file: protobuf and JSON can say anything."""


@contextmanager
def blaming(path: str | Path) -> Iterator[None]:
    """Turn what fails because of what a file says into an error that names the file."""
    try:
        yield
    except DAMAGE as error:
        raise DiffQError(f"{str(path)!r} is damaged: {error!r}. Export or download it again.") from error


def load_graph(path: str | Path) -> "ModelProto":
    """Read an ONNX file (protobuf, whatever its ending); a tensor kept in another file stays there.

    Raises:
        FileNotFoundError: There is no such file.
        DiffQError: The file cannot be read (it is a folder, or forbidden), is of another kind, or cut short.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = as_path("an ONNX file", "path", path)
    named = repr(str(path))
    if kind := foreign_kind(path):
        raise DiffQError(f"{named} {kind}; an ONNX file is wanted.")
    if looks_like_safetensors(path):
        raise DiffQError(f"{named} is a safetensors file: it holds weights and no graph, and does not run by itself. Give an ONNX file.")
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no file {named}.") from error
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise DiffQError(f"cannot read {named}: {getattr(error, 'strerror', None) or error}.") from error
    try:
        model = onnx.load_from_string(content)
    except DecodeError as error:
        raise DiffQError(f"{named} ({len(content)} bytes) is not an ONNX file, or was cut short: {error}.") from error
    if not model.HasField("graph") or not model.opset_import:
        raise DiffQError(f"{named} ({len(content)} bytes) is not an ONNX file, or was cut short: it has no graph or no opset.")
    return model


def container_bits(data_type: int) -> int:
    """Bits that one value of a TensorProto data type takes in a file; 0 for strings, whose length varies.

    Example:
        >>> container_bits(22), container_bits(1)
        (4, 32)
    """
    from onnx_ir import DataType

    return 0 if data_type == DataType.STRING else DataType(data_type).bitwidth


def payload_bytes(tensor: "TensorProto") -> int:
    """Bytes of the values alone, packed as raw_data packs them, wherever and however the file keeps them; the length of strings.

    Raises:
        DiffQError: The tensor holds fewer or more bytes than its shape needs.
    """
    if bits := container_bits(tensor.data_type):
        expected = -(-math.prod(tensor.dims) * bits // 8)
        if tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
            raise DiffQError(
                f"tensor '{tensor.name}' of shape {list(tensor.dims)} and type {tensor.DataType.Name(tensor.data_type).lower()} "
                f"holds {len(tensor.raw_data)} bytes instead of {expected}: the file is damaged."
            )
        return expected
    return sum(len(text) for text in tensor.string_data)


class Region(NamedTuple):
    """A part of a file, in bytes."""

    location: str
    offset: int
    length: int


def external_region(tensor: "TensorProto") -> Region | None:
    """Where a tensor's data lies outside the ONNX file; None if it lies inside."""
    if tensor.data_location != tensor.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = int(entries["length"]) if "length" in entries else payload_bytes(tensor)
    region = Region(entries.get("location", ""), int(entries.get("offset", 0)), length)
    if min(region.length, region.offset) < 0:
        raise ValueError(f"tensor '{tensor.name}' has {length} bytes at {region.offset}")
    if Path(region.location).is_absolute() or ".." in Path(region.location).parts:
        raise DiffQError(f"tensor '{tensor.name}' keeps weights outside of its folder, in '{region.location}', which is not looked at.")
    return region


def size_bytes(path: str | Path, locations: Iterable[str]) -> int:
    """Bytes on disk of an ONNX file and of those at ``locations``, where its external data lies, relative to its folder.

    Raises:
        FileNotFoundError: One of them is missing.
    """
    path = Path(path)
    outside = [path.parent / location for location in sorted(set(locations))]
    for file in outside:
        if not file.is_file():
            raise FileNotFoundError(f"'{path}' keeps weights in '{file.name}', which is missing: put it in the same folder.")
    return sum(file.stat().st_size for file in (path, *outside))
