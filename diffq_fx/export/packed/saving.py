"""save_packed: a converted model to one file, at the entropy of its levels."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding.streams import encode_bytes
from diffq_fx.export.packed.contents import ModelContents, contents_of
from diffq_fx.export.packed.fileformat.container import RESERVED, write_container
from diffq_fx.export.packed.fileformat.dtypes import TENSOR_TYPES, bytes_of
from diffq_fx.export.packed.fileformat.header import (
    SMALL_NAME,
    CommonTensor,
    Contents,
    PlainTensor,
    Shard,
    SmallTensors,
    common_name,
    contents_to_json,
    shard_name,
    small_size,
)
from diffq_fx.export.packed.kinds import kind_of_stored
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.export.packed.shard_writing import FEW_WEIGHTS, encode_shard
from diffq_fx.export.packed.shards import Span
from diffq_fx.storage import StoredWeight
from diffq_fx.storage.packing import SMALL_TABLE_BYTES, narrowed

PackedCompression = Literal["entropy", "bits"]

_COMPRESSIONS = ("entropy", "bits")
_LEAST_CODES, _MOST_CODES = 1 << 21, 1 << 23
_SHARDS = 4
"""Shards of a model that is neither small nor large: enough for a few threads, few enough to fill the coder's lanes."""


def save_packed(model: nn.Module, path: str | Path, compression: PackedCompression = "entropy") -> Path:
    """Save a converted model with the exact learned bits: 3 stays 3, 5 stays 5.

    The file is a safetensors file without any pickle. It holds the levels, scales and zero points of every quantized weight once, and every
    other parameter and buffer as it is (float32 values that float16 holds exactly are stored as such). :func:`load_packed` gives back
    every value bit by bit. The file takes its place at once: whoever kills the process finds the old file or the new one.

    Args:
        model: from ``convert_diffq``, a piece of one, or a module that holds some.
        path: the file to write; its folder must exist.
        compression: "entropy" codes levels at their entropy (smaller), "bits" packs them at their width (faster to load).

    Returns:
        The path.

    Raises:
        PackedFileError: the model is not converted, holds something that a file cannot, or the file cannot be written.
        ValueError: there is no such compression.

    Example:
        >>> import tempfile, warnings
        >>> from diffq_fx import convert_diffq, prepare_diffq
        >>> from diffq_fx.export import load_packed, save_packed
        >>> model = torch.nn.Linear(64, 64)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     converted = convert_diffq(prepare_diffq(model, torch.zeros(1, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights = load_packed(save_packed(converted, Path(folder) / "model.safetensors"))
        >>> torch.equal(weights["weight"], converted.weight_quantized())
        True
    """
    if compression not in _COMPRESSIONS:
        raise ValueError(f'save_packed: compression must be "entropy" or "bits", got {compression!r}.')
    try:
        write_packed(contents_of(model), Path(path), entropy=compression == "entropy")
    except PackedFileError as error:
        raise PackedFileError(f"save_packed: {error}.") from error
    return Path(path)


def write_packed(model: ModelContents, path: Path, *, entropy: bool) -> None:
    """Write stored weights and plain tensors to a packed file.

    Raises:
        PackedFileError: a weight cannot be packed, a tensor's type or name is not possible, or the file cannot be written.
    """
    packed = [_packed(stored) for stored in model.stored]
    tensors = sorted(
        (_plain(names, tensor) for names, tensor in _equal_tables_once(model.tensors)), key=lambda pair: -pair[0].stored_dtype.itemsize
    )
    commons = [_common(index, each, stored) for index, (each, stored) in enumerate(zip(packed, model.stored, strict=True)) if each.common]
    shards, blobs = [], []
    for spans in plan_shards(packed):
        data, head = encode_shard(spans, packed, model.stored, entropy=entropy)
        shards.append(Shard(tuple(spans), head, zlib.crc32(data)))
        blobs.append(data)
    crc, large = 0, [(tensor, data) for tensor, data in tensors if not tensor.is_small]
    for _, data in large:
        crc = zlib.crc32(data, crc)
    few = sum(weight.spec.numel for weight in packed) <= FEW_WEIGHTS
    small, coded = _small([data for tensor, data in tensors if tensor.is_small], entropy=entropy, is_patient=few)
    every = tuple(tensor for tensor, _ in tensors)
    contents = Contents(tuple(packed), every, crc, small, tuple(common for common, _ in commons), tuple(shards))
    _refuse_equal_names(contents)
    entries = [(t.name, TENSOR_TYPES.name(t.stored_dtype), t.shape, data) for t, data in large]
    entries += [(common_name(c.weight), TENSOR_TYPES.name(c.dtype), c.shape, data) for c, data in commons]
    entries.sort(key=lambda entry: -TENSOR_TYPES.parse(entry[1]).itemsize)  # every tensor lies at a multiple of its item's size
    entries += [(SMALL_NAME, "U8", (len(coded),), coded)] if small else []
    entries += [(shard_name(index), "U8", (len(data),), data) for index, data in enumerate(blobs)]
    write_container(path, entries, contents_to_json(contents))


def _packed(stored: StoredWeight) -> PackedWeight:
    try:
        return kind_of_stored(stored).of_stored(stored)
    except PackedFileError as error:
        raise PackedFileError(f"weight '{stored.spec.name}': {error}") from error


def _equal_tables_once(tensors: Sequence[tuple[tuple[str, ...], Tensor]]) -> list[tuple[tuple[str, ...], Tensor]]:
    """Large integer tables that are equal (relative positions, in every layer) as one with several names."""
    found: dict[Any, tuple[tuple[str, ...], Tensor]] = {}
    for names, tensor in tensors:
        is_table = not tensor.is_floating_point() and not tensor.is_complex() and tensor.nbytes >= SMALL_TABLE_BYTES
        key = (tensor.dtype, tensor.shape, bytes_of(tensor)) if is_table else names
        earlier, _ = found.get(key, ((), tensor))
        found[key] = (*earlier, *names), tensor
    return list(found.values())


def _plain(names: tuple[str, ...], tensor: Tensor) -> tuple[PlainTensor, bytes]:
    """A tensor and its bytes, in float16 or a smaller integer type where that holds the same values."""
    stored = narrowed(tensor)
    if tensor.dtype == torch.float32:
        half = tensor.half()
        if bytes_of(half.float()) == bytes_of(tensor):
            stored = half
    try:
        TENSOR_TYPES.name(tensor.dtype)
    except PackedFileError as error:
        raise PackedFileError(f"tensor '{names[0]}': {error}") from error
    data = bytes_of(stored)
    return PlainTensor(names[0], names[1:], tensor.dtype, stored.dtype, tuple(tensor.shape), 0, len(data)), data


def _small(pieces: Sequence[bytes], *, entropy: bool, is_patient: bool) -> tuple[SmallTensors | None, bytes]:
    """Small tensors as one: what the header says of them, and their bytes, with zeros up to those that it must have."""
    data = b"".join(pieces)
    if not data:
        return None, b""
    coded = encode_bytes(data, entropy=entropy, is_patient=is_patient)
    filled = coded + bytes(small_size(len(coded), len(data)) - len(coded))
    return SmallTensors(len(data), len(coded), zlib.crc32(filled)), filled


def _common(index: int, packed: PackedWeight, stored: StoredWeight) -> tuple[CommonTensor, bytes]:
    tensor = packed.common_of(stored)
    if tensor is None or packed.common is None:
        raise PackedFileError(f"weight '{packed.spec.name}': its common tensor is missing")
    data = bytes_of(tensor)
    return CommonTensor(index, *packed.common, zlib.crc32(data)), data


def _refuse_equal_names(contents: Contents) -> None:
    every = [weight.spec.names for weight in contents.weights] + [tensor.names for tensor in contents.tensors]
    names = [name for each in every for name in each]
    for name in names:
        if name.startswith(RESERVED) or name == "__metadata__":
            raise PackedFileError(f"a tensor cannot be named '{name}': that name is the file format's own")
    if len(set(names)) != len(names):
        raise PackedFileError(f"two tensors have the name '{max(names, key=names.count)}'")


def plan_shards(weights: Sequence[PackedWeight]) -> list[list[Span]]:
    """Divide the rows of all weights, in order, into shards of about equal size.

    Args:
        weights: all weights of the file.

    Returns:
        The spans of each shard.
    """
    total = sum(weight.spec.numel for weight in weights)
    number = -(-total // min(max(total // _SHARDS, _LEAST_CODES), _MOST_CODES))
    room = -(-total // max(number, 1))
    shards: list[list[Span]] = []
    left = 0
    for index, weight in enumerate(weights):
        row, columns = 0, weight.spec.columns
        while row < weight.spec.rows:
            if left < columns / 2:
                shards.append([])
                left += room
            rows = min(max(round(left / columns), 1), weight.spec.rows - row)
            shards[-1].append(Span(index, row, rows))
            row += rows
            left -= rows * columns
    return shards
