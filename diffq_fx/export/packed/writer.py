"""save_packed: a converted model to one file, at the entropy of its levels."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffq_fx.arguments import as_path
from diffq_fx.atomic import replaced_atomically
from diffq_fx.budget.entropy import SMALL_BYTES
from diffq_fx.compression import Compression
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.container import RESERVED, container_of
from diffq_fx.export.packed.dtypes import FLOAT_TYPES, TENSOR_TYPES, bytes_of
from diffq_fx.export.packed.header import ITS_OWN, KINDS, SMALL_NAME, common_name, shard_name, small_size, type_in_model
from diffq_fx.export.packed.shards import FEW_WEIGHTS, encode_shard, plan_shards
from diffq_fx.export.packed.streams import Effort, encode_bytes
from diffq_fx.export.packed.weight_kind import PackedWeight
from diffq_fx.parts import parts_of, stored_weights, unwrapped
from diffq_fx.storage import StoredWeight
from diffq_fx.storage.packing import in_smallest_type, table_key

PackedCompression = Literal["entropy", "bits"]
NamedTensors = Sequence[tuple[tuple[str, ...], Tensor]]  # tensors, each once with all its names


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
    path = as_path("save_packed", "path", path)
    try:
        weights, rest = model_contents(model)
        write_packed([stored for _, stored in weights], rest, path, entropy=compression == "entropy")
    except PackedFileError as error:
        raise PackedFileError(f"save_packed: {error}.") from error
    return path


def model_contents(model: nn.Module) -> tuple[list[tuple[StoredWeight, StoredWeight]], NamedTensors]:
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
    own = {name for _, stored in weights for name in stored.spec.names}  # a layer with a state_dict of its own makes them
    rest = {name: value for name, value in root.state_dict().items() if name not in own and not name.startswith(places)}
    return weights, grouped_by_storage(rest)


def grouped_by_storage(tensors: Mapping[str, Any]) -> NamedTensors:
    """Tensors that are one and the same, with all their names; an error if one of them is not a plain tensor."""
    names: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(_identity(name, tensor), []).append(name)
    return [(tuple(group), tensors[group[0]].detach()) for group in names.values()]


def _identity(name: str, tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor):  # such as torchao's: it has no storage of its own
        raise PackedFileError(f"'{name}' is a {type(tensor).__name__}, not a plain tensor: a packed file cannot hold it")
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise PackedFileError(f"'{name}' is not initialized yet: run the model once")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise PackedFileError(f"'{name}' is {kind}: it has no values that could be stored or filled in")
    if not tensor.numel():
        return name
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def write_packed(stored: Sequence[StoredWeight], rest: NamedTensors, path: str | Path, *, entropy: bool) -> None:
    """Write stored weights and plain tensors to a packed file, whole or not at all.

    An error as for :func:`packed`, or if the file cannot be written.
    """
    pieces = packed(stored, rest, entropy=entropy)
    with replaced_atomically(Path(path), PackedFileError) as file:
        file.writelines(pieces)


def packed(stored: Sequence[StoredWeight], rest: NamedTensors, *, entropy: bool) -> list[bytes]:
    """The bytes of a packed file of stored weights and plain tensors, in pieces.

    An error if a weight cannot be packed, or a tensor's type or name is not possible.
    """
    weights = [_packed(each) for each in stored]
    _check_names([weight.spec.names for weight in weights] + [names for names, _ in rest])
    tensors = sorted((_plain(*each) for each in _equal_tables_once(rest)), key=lambda tensor: -tensor.stored.itemsize)
    large, small = ([tensor for tensor in tensors if (len(tensor.data) < SMALL_BYTES) == is_small] for is_small in (False, True))
    commons = {index: bytes_of(weight.common) for index, weight in enumerate(weights) if weight.common_type}
    entries = [(tensor.names[0], tensor.stored, tensor.shape, tensor.data) for tensor in large]
    for index, data in commons.items():
        entries.append((common_name(index), weights[index].common.dtype, tuple(weights[index].common.shape), data))
    entries.sort(key=lambda entry: -entry[1].itemsize)  # every tensor lies at a multiple of its item's size
    crc = 0
    for tensor in large:
        crc = zlib.crc32(tensor.data, crc)
    contents: dict[str, Any] = _weights_json(weights, {index: zlib.crc32(data) for index, data in commons.items()})
    contents["tensors"] = {tensor.names[0]: facts for tensor in large if (facts := tensor.to_json())}
    contents |= {"tensors_crc32": crc, "small": {tensor.names[0]: tensor.to_json() for tensor in small}, "small_section": []}
    if data := b"".join(tensor.data for tensor in small):
        coded = encode_bytes(data, Effort(entropy, is_patient=sum(weight.spec.numel for weight in weights) <= FEW_WEIGHTS))
        filled = coded.ljust(small_size(len(coded), len(data)), b"\0")
        contents["small_section"] = [len(coded), zlib.crc32(filled)]
        entries.append((SMALL_NAME, torch.uint8, (len(filled),), filled))
    contents["shards"] = []
    for index, spans in enumerate(plan_shards(weights)):
        data, facts = encode_shard(spans, weights, stored, entropy=entropy)
        contents["shards"].append(facts)
        entries.append((shard_name(index), torch.uint8, (len(data),), data))
    return container_of([(name, TENSOR_TYPES.name(dtype), shape, data) for name, dtype, shape, data in entries], contents)


def _packed(stored: StoredWeight) -> PackedWeight:
    for kind in KINDS:
        if isinstance(stored, kind.stored_type):
            try:
                return kind.of_stored(stored)
            except PackedFileError as error:
                raise PackedFileError(f"weight '{stored.spec.name}': {error}") from error
    raise PackedFileError(f"weight '{stored.spec.name}': a packed file cannot hold a {type(stored).__name__}")


def _check_names(every: Sequence[tuple[str, ...]]) -> None:
    names = [name for each in every for name in each]
    for name in names:
        if name.startswith(RESERVED) or name == "__metadata__":
            raise PackedFileError(f"a tensor cannot be named '{name}': that name is the file format's own")
    if len(set(names)) != len(names):
        raise PackedFileError(f"two tensors have the name '{max(names, key=names.count)}'")


def _equal_tables_once(tensors: NamedTensors) -> NamedTensors:
    """Large integer tables that are equal (relative positions, in every layer) as one with several names."""
    found: dict[Any, tuple[tuple[str, ...], Tensor]] = {}
    for names, tensor in tensors:
        key = table_key(tensor)
        found[key] = found[key][0] + names if key in found else names, tensor
    return list(found.values())


class _Plain(NamedTuple):
    """A tensor that is stored as it is, in float16 or a smaller integer type where that holds the same values."""

    names: tuple[str, ...]
    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    def to_json(self) -> dict[str, Any]:
        """What the header says beyond the name; a small tensor is none of the container, which knows a large one's shape and type."""
        found: dict[str, Any] = {"shape": list(self.shape)} if len(self.data) < SMALL_BYTES else {}
        if found and self.stored != torch.float32:
            found["stored"] = TENSOR_TYPES.name(self.stored)
        if self.dtype != type_in_model(self.stored):
            found["dtype"] = TENSOR_TYPES.name(self.dtype)
        return found | ({"aliases": list(self.names[1:])} if self.names[1:] else {})


def _plain(names: tuple[str, ...], tensor: Tensor) -> _Plain:
    stored = in_smallest_type(tensor)
    try:
        TENSOR_TYPES.name(tensor.dtype)
    except PackedFileError as error:
        raise PackedFileError(f"tensor '{names[0]}': {error}") from error
    return _Plain(names, tensor.dtype, stored.dtype, tuple(tensor.shape), bytes_of(stored))


def _weights_json(weights: Sequence[PackedWeight], common_crcs: Mapping[int, int]) -> dict[str, Any]:
    """What the header says of weights, and for each kind what all of them say alike, so that they need not say it."""
    every, defaults = [], {}
    for index, weight in enumerate(weights):
        spec = weight.spec
        fields: dict[str, Any] = {"name": spec.name, "kind": weight.kind, "shape": list(spec.shape), "axis": spec.axis}
        fields |= {"aliases": list(spec.aliases)} if spec.aliases else {}
        fields |= {"dtype": FLOAT_TYPES.name(spec.dtype), "group_size": spec.group_size, "range_size": spec.range_size, "grid": spec.grid}
        fields |= {"consumer": spec.consumer} | weight.facts()
        fields |= {"common_crc32": common_crcs[index]} if index in common_crcs else {}
        shared = defaults.setdefault(weight.kind, {key: value for key, value in fields.items() if key not in ITS_OWN})
        defaults[weight.kind] = {key: value for key, value in shared.items() if key in fields and fields[key] == value}
        every.append(fields)
    short = [{key: value for key, value in each.items() if key not in defaults[each["kind"]]} for each in every]
    return {"defaults": defaults, "weights": short}
