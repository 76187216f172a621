"""save_packed: a converted model to one file, at the entropy of its levels."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from diffq_fx.compression import Compression
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.container import RESERVED, write_container
from diffq_fx.export.packed.dtypes import TENSOR_TYPES, bytes_of
from diffq_fx.export.packed.header import KINDS, SMALL_NAME, Contents, PlainTensor, SmallTensors, common_name, shard_name, small_size
from diffq_fx.export.packed.shards import FEW_WEIGHTS, encode_shard, plan_shards
from diffq_fx.export.packed.streams import Effort, encode_bytes
from diffq_fx.export.packed.weight_kind import PackedWeight
from diffq_fx.parts import parts_of, stored_weights, unwrapped
from diffq_fx.storage import StoredWeight
from diffq_fx.storage.packing import SMALL_TABLE_BYTES, narrowed

PackedCompression = Literal["entropy", "bits"]
NamedTensors = Sequence[tuple[tuple[str, ...], Tensor]]
"""Tensors, each once with all its names."""


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
        TypeError: the model or the path is of another type.
        ValueError: there is no such compression.

    Example:
        >>> import tempfile
        >>> from diffq_fx import convert, prepare
        >>> from diffq_fx.export import load_packed, save_packed
        >>> from diffq_fx.methods import STE
        >>> converted = convert(prepare(torch.nn.Linear(64, 64), torch.zeros(1, 64), STE(bits=4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights = load_packed(save_packed(converted, Path(folder) / "model.safetensors"))
        >>> torch.equal(weights["weight"], converted.weight_quantized())
        True
    """
    if compression not in ("entropy", "bits"):
        raise ValueError(f'save_packed: compression must be "entropy" or "bits", got {compression!r}.')
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_packed: model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(path, str | Path):
        raise TypeError(f"save_packed: path must be a str or a Path, got {type(path).__name__}.")
    try:
        weights, rest = contents_of(model)
        write_packed([stored for _, stored in weights], rest, path, entropy=compression == "entropy")
    except PackedFileError as error:
        raise PackedFileError(f"save_packed: {error}.") from error
    return Path(path)


def contents_of(model: nn.Module) -> tuple[list[tuple[StoredWeight, StoredWeight]], NamedTensors]:
    """What of a converted model goes into a file: the stored weights as :func:`~diffq_fx.parts.stored_weights` gives them, and the rest.

    An error if the model is not converted, or holds something that is not a tensor.
    """
    root = unwrapped(model)
    for path, part in parts_of(root, Compression).items():
        name = f"'{path}' ({type(part).__name__})" if path else f"the {type(part).__name__}"
        raise PackedFileError(f"{name} is prepared, not converted. Call convert_diffq(model) and give its result")
    if not (weights := stored_weights(root)):
        raise PackedFileError(f"the {type(root).__name__} was never converted. Prepare, train and convert it first")
    places = tuple(f"{name}." for name, m in root.named_modules(remove_duplicate=False) if isinstance(m, StoredWeight))
    rest = {name: value for name, value in root.state_dict(keep_vars=True).items() if not name.startswith(places)}
    return weights, grouped_by_storage(rest)


def grouped_by_storage(tensors: Mapping[str, Any]) -> NamedTensors:
    """Tensors that are one and the same, with all their names; an error if one of them is not a plain tensor."""
    names: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(_identity(name, tensor), []).append(name)
    return [(tuple(group), tensors[group[0]].detach()) for group in names.values()]


def _identity(name: str, tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        raise PackedFileError(f"'{name}' is a {type(tensor).__name__}, not a tensor: a packed file cannot hold it")
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise PackedFileError(f"'{name}' is not initialized yet: run the model once")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise PackedFileError(f"'{name}' is {kind}: it has no values that could be stored or filled in")
    if not tensor.numel():
        return name
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def write_packed(stored: Sequence[StoredWeight], rest: NamedTensors, path: str | Path, *, entropy: bool) -> None:
    """Write stored weights and plain tensors to a packed file.

    An error if a weight cannot be packed, a tensor's type or name is not possible, or the file cannot be written.
    """
    weights = [_packed(each) for each in stored]
    tensors = sorted((_plain(*each) for each in _equal_tables_once(rest)), key=lambda pair: -pair[0].stored_dtype.itemsize)
    large = [(tensor, data) for tensor, data in tensors if not tensor.is_small]
    crc = 0
    for _, data in large:
        crc = zlib.crc32(data, crc)
    effort = Effort(entropy, is_patient=sum(weight.spec.numel for weight in weights) <= FEW_WEIGHTS)
    small, coded = _small(b"".join(data for tensor, data in tensors if tensor.is_small), effort)
    encoded = [encode_shard(spans, weights, stored, entropy=entropy) for spans in plan_shards(weights)]
    contents = Contents(tuple(weights), tuple(tensor for tensor, _ in tensors), crc, small, tuple(shard for _, shard in encoded))
    for name in contents.names():
        if name.startswith(RESERVED) or name == "__metadata__":
            raise PackedFileError(f"a tensor cannot be named '{name}': that name is the file format's own")
    commons = {index: bytes_of(weight.common) for index, weight in enumerate(weights) if weight.common_type}
    entries = [(tensor.names[0], tensor.stored_dtype, tensor.shape, data) for tensor, data in large]
    entries += [(common_name(index), weights[index].common.dtype, weights[index].common.shape, data) for index, data in commons.items()]
    entries.sort(key=lambda entry: -entry[1].itemsize)  # every tensor lies at a multiple of its item's size
    entries += [(SMALL_NAME, torch.uint8, (len(coded),), coded)] if small else []
    entries += [(shard_name(index), torch.uint8, (len(data),), data) for index, (data, _) in enumerate(encoded)]
    common_crcs = {index: zlib.crc32(data) for index, data in commons.items()}
    named = [(name, TENSOR_TYPES.name(dtype), tuple(shape), data) for name, dtype, shape, data in entries]
    write_container(path, named, contents.to_json(common_crcs))


def _packed(stored: StoredWeight) -> PackedWeight:
    for kind in KINDS:
        if isinstance(stored, kind.stored_type):
            try:
                return kind.of_stored(stored)
            except PackedFileError as error:
                raise PackedFileError(f"weight '{stored.spec.name}': {error}") from error
    raise PackedFileError(f"weight '{stored.spec.name}': a packed file cannot hold a {type(stored).__name__}")


def _equal_tables_once(tensors: NamedTensors) -> NamedTensors:
    """Large integer tables that are equal (relative positions, in every layer) as one with several names."""
    found: dict[Any, tuple[tuple[str, ...], Tensor]] = {}
    for names, tensor in tensors:
        is_table = not tensor.is_floating_point() and not tensor.is_complex() and tensor.nbytes >= SMALL_TABLE_BYTES
        key = (tensor.dtype, tensor.shape, bytes_of(tensor)) if is_table else names
        found[key] = found[key][0] + names if key in found else names, tensor
    return list(found.values())


def _plain(names: tuple[str, ...], tensor: Tensor) -> tuple[PlainTensor, bytes]:
    """A tensor and its bytes, in float16 or a smaller integer type where that holds the same values."""
    stored = narrowed(tensor)
    if tensor.dtype == torch.float32 and bytes_of(tensor.half().float()) == bytes_of(tensor):
        stored = tensor.half()
    try:
        TENSOR_TYPES.name(tensor.dtype)
    except PackedFileError as error:
        raise PackedFileError(f"tensor '{names[0]}': {error}") from error
    data = bytes_of(stored)
    return PlainTensor(names, tensor.dtype, stored.dtype, tuple(tensor.shape), 0, len(data)), data


def _small(data: bytes, effort: Effort) -> tuple[SmallTensors | None, bytes]:
    """Small tensors as one: what the header says of them, and their bytes, with zeros up to those that it must have."""
    if not data:
        return None, b""
    coded = encode_bytes(data, effort)
    filled = coded + bytes(small_size(len(coded), len(data)) - len(coded))
    return SmallTensors(len(data), len(coded), zlib.crc32(filled)), filled
