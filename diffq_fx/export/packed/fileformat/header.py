"""The contents of a packed file's header: weights, plain tensors and shards, written as JSON and read with every value checked.

``docs/packed-format.md`` is the schema.
"""

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from diffq_fx.budget.entropy import SMALL_BYTES
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding.classes import BINS, MAX_WIDTH, CodeClass
from diffq_fx.export.packed.fileformat.container import MOST_SIDES, RESERVED, Entry, is_integers
from diffq_fx.export.packed.fileformat.dtypes import FLOAT_TYPES, TENSOR_TYPES, can_stand_for
from diffq_fx.export.packed.kinds import kind_of_name
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.export.packed.shard_reading import shard_size
from diffq_fx.export.packed.shards import SECTIONS, ShardHead, Span
from diffq_fx.weights import WeightSpec

_GROUP_KINDS = ("tensor", "channel")
_GRIDS = ("affine", "symmetric", "float")
_MOST_CODES = 1 << 40
_MOST_CRC = 1 << 32
_SMALL_PER_BYTE = 128
_ITS_OWN = ("name", "aliases", "kind", "shape", "common_crc32")
"""What no weight leaves to the defaults of its kind."""


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is stored as it is."""

    name: str
    aliases: tuple[str, ...]
    dtype: torch.dtype
    """The type that it has in the model; in the file it may be a smaller one that holds the same values."""
    stored_dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the first byte of all small tensors where it is small, else as the container counts."""
    stop: int

    @property
    def is_small(self) -> bool:
        """Whether it lies together with others."""
        return self.stop - self.start < SMALL_BYTES

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the tensor, the first one first."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class SmallTensors:
    """The bytes of all small plain tensors, where they lie."""

    size: int
    """Their bytes in all, before they are coded."""
    coded_size: int
    """Their bytes when coded; zeros follow, if these are less than one for 128."""
    crc32: int
    """Of the coded bytes and the zeros."""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class CommonTensor:
    """What all rows of a weight need, such as its codebook."""

    weight: int
    """Number of the weight in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Shard:
    """Rows of weights that are coded together, and where they lie."""

    spans: tuple[Span, ...]
    head: ShardHead
    crc32: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Contents:
    """Everything that a packed file's header says."""

    weights: tuple[PackedWeight, ...]
    tensors: tuple[PlainTensor, ...]
    tensors_crc32: int
    """Of the bytes of all plain tensors that are not small, in file order."""
    small: SmallTensors | None
    commons: tuple[CommonTensor, ...]
    shards: tuple[Shard, ...]

    def names(self) -> dict[str, str]:
        """The first name of each tensor or weight, by every name."""
        every = [weight.spec.names for weight in self.weights] + [tensor.names for tensor in self.tensors]
        return {name: names[0] for names in every for name in names}


def shard_name(index: int) -> str:
    """Name of a shard's tensor in the container."""
    return f"{RESERVED}shard/{index}"


SMALL_NAME = f"{RESERVED}small"
"""Name of the small tensors in the container."""


def small_size(coded_size: int, size: int) -> int:
    """Bytes of the container's tensor that holds so many bytes of small tensors: one for 128 of them or more."""
    return max(coded_size, -(-size // _SMALL_PER_BYTE))


def common_name(weight: int) -> str:
    """Name of the common tensor of a weight in the container."""
    return f"{RESERVED}common/{weight}"


def contents_to_json(contents: Contents) -> dict[str, Any]:
    """What :func:`contents_from_json` reads; offsets are the container's to know."""
    extras = {tensor.name: _tensor_to_json(tensor) for tensor in contents.tensors if not tensor.is_small}
    weights = [_weight_to_json(weight) for weight in contents.weights]
    for common in contents.commons:
        weights[common.weight]["common_crc32"] = common.crc32
    defaults = _defaults(weights)
    return {
        "defaults": defaults,
        "weights": [{key: value for key, value in each.items() if key not in defaults[each["kind"]]} for each in weights],
        "tensors": {name: extra for name, extra in extras.items() if extra},
        "tensors_crc32": contents.tensors_crc32,
        "small": {tensor.name: _small_to_json(tensor) for tensor in contents.tensors if tensor.is_small},
        "small_section": [] if contents.small is None else [contents.small.coded_size, contents.small.crc32],
        "shards": [
            {
                "crc32": shard.crc32,
                "spans": [[span.weight, span.first_row, span.rows] for span in shard.spans],
                "classes": [[each.width, each.first_bin, each.last_bin] for each in shard.head.classes],
                "sections": list(shard.head.sections),
            }
            for shard in contents.shards
        ],
    }


def _defaults(weights: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each kind what all its weights say alike, so that they need not say it."""
    found: dict[str, dict[str, Any]] = {}
    for weight in weights:
        shared = found.setdefault(weight["kind"], {key: value for key, value in weight.items() if key not in _ITS_OWN})
        found[weight["kind"]] = {key: value for key, value in shared.items() if key in weight and weight[key] == value}
    return found


def _widened(dtype: torch.dtype) -> torch.dtype:
    """The type that a tensor of this stored type has in the model, unless the header says otherwise."""
    return torch.float32 if dtype == torch.float16 else dtype


def _tensor_to_json(tensor: PlainTensor) -> dict[str, Any]:
    dtype = {"dtype": TENSOR_TYPES.name(tensor.dtype)} if tensor.dtype != _widened(tensor.stored_dtype) else {}
    return dtype | ({"aliases": list(tensor.aliases)} if tensor.aliases else {})


def _small_to_json(tensor: PlainTensor) -> dict[str, Any]:
    stored = {} if tensor.stored_dtype == torch.float32 else {"stored": TENSOR_TYPES.name(tensor.stored_dtype)}
    return {"shape": list(tensor.shape)} | stored | _tensor_to_json(tensor)


def _weight_to_json(weight: PackedWeight) -> dict[str, Any]:
    spec = weight.spec
    fields: dict[str, Any] = {"name": spec.name, "kind": weight.kind, "shape": list(spec.shape), "axis": spec.axis}
    if spec.aliases:
        fields["aliases"] = list(spec.aliases)
    fields |= {"dtype": FLOAT_TYPES.name(spec.dtype), "group_size": spec.group_size, "range_size": spec.range_size, "grid": spec.grid}
    return fields | {"consumer": spec.consumer} | weight.facts()


def contents_from_json(value: Mapping[str, Any], entries: Mapping[str, Entry]) -> Contents:
    """Read the contents, and check them against each other and the tensors of the container.

    Raises:
        PackedFileError: something is missing, not possible, or does not fit; nothing of a declared size has been allocated.
    """
    weight_values = _with_defaults(_list(value, "weights"), value.get("defaults"))
    weights = tuple(_weight_from_json(each) for each in weight_values)
    described = value.get("tensors")
    if not isinstance(described, dict):
        raise PackedFileError("the header does not say what its tensors are")
    plain = {name: entry for name, entry in entries.items() if not name.startswith(RESERVED)}
    if unknown := sorted(described.keys() - plain.keys()):
        raise PackedFileError(f"the header describes tensor '{unknown[0]}', which is not there")
    tensors = tuple(_tensor_from_json(name, described.get(name, {}), entry, is_small=False) for name, entry in plain.items())
    small_tensors, small = _small_from_json(value.get("small"), value.get("small_section"), entries.get(SMALL_NAME))
    found = _list(value, "shards")
    of_weights = {common_name(i) for i, weight in enumerate(weights) if weight.common}
    ours = of_weights | {shard_name(i) for i in range(len(found))} | ({SMALL_NAME} if small else set())
    if set(entries) - set(plain) != ours:
        raise PackedFileError(f"the header describes {len(found)} shards and {len(of_weights)} common tensors, the file has others")
    commons = tuple(_common_from_json(weight_values[i], entries[common_name(i)], i, w) for i, w in enumerate(weights) if w.common)
    shards = tuple(_shard_from_json(each, entries[shard_name(i)], i, weights) for i, each in enumerate(found))
    _check_spans(weights, shards)
    if max((t.stop for t in (*tensors, *commons)), default=0) > min((s.start for s in shards), default=1 << 62):
        raise PackedFileError("a tensor lies between the shards")
    contents = Contents(weights, tensors + small_tensors, _crc(value.get("tensors_crc32")), small, commons, shards)
    count = sum(len(w.spec.names) for w in weights) + sum(len(t.names) for t in contents.tensors)
    if len(contents.names()) != count:
        raise PackedFileError("two tensors have one name")
    return contents


def _with_defaults(weights: Sequence[dict[str, Any]], defaults: Any) -> list[Mapping[str, Any]]:
    """Weights with what they leave to the defaults of their kind."""
    if not isinstance(defaults, dict) or not all(isinstance(each, dict) and each.keys().isdisjoint(_ITS_OWN) for each in defaults.values()):
        raise PackedFileError("the header has no defaults of its weights, or some that a weight must say itself")
    kinds = [each.get("kind") for each in weights]
    return [ChainMap(each, defaults.get(kind, {}) if isinstance(kind, str) else {}) for each, kind in zip(weights, kinds, strict=True)]


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise PackedFileError(f"the header has no list of {key}")
    return found


def _crc(value: Any) -> int:
    if not is_integers([value], _MOST_CRC):
        raise PackedFileError("a checksum is missing in the header")
    return value


def _names(name: Any, aliases: Any) -> tuple[str, tuple[str, ...]]:
    if not isinstance(name, str) or not isinstance(aliases, list) or not all(isinstance(each, str) for each in aliases):
        raise PackedFileError(f"a tensor's name {str(name)[:100]!r} or aliases {str(aliases)[:100]!r} are not text")
    return name, tuple(aliases)


def _weight_from_json(value: Mapping[str, Any]) -> PackedWeight:
    name, aliases = _names(value.get("name"), value.get("aliases", []))
    try:
        kind, shape = kind_of_name(value.get("kind")), _shape(value.get("shape"))
        axis, grid, consumer = value.get("axis"), value.get("grid"), value.get("consumer")
        if not isinstance(axis, int) or not is_integers([axis], len(shape)) or grid not in _GRIDS or not isinstance(consumer, str):
            raise PackedFileError(f"its axis {axis!r}, grid {grid!r} or consumer {consumer!r} is not possible")
        spec = WeightSpec(
            name=name,
            aliases=aliases,
            shape=shape,
            axis=axis,
            dtype=FLOAT_TYPES.parse(value.get("dtype")),
            group_size=_group_size(value.get("group_size")),
            range_size=_group_size(value.get("range_size")),
            grid=grid,
            consumer=consumer,
        )
        return kind.of_facts(spec, value)
    except PackedFileError as error:
        raise PackedFileError(f"weight '{name}': {error}") from error


def _shape(value: Any) -> tuple[int, ...]:
    sound = is_integers(value, _MOST_CODES) and 1 <= len(value) <= MOST_SIDES and 0 not in value
    if not sound or math.prod(value) > _MOST_CODES:
        raise PackedFileError(f"its shape {str(value)[:100]} is not possible")
    return tuple(value)


def _group_size(value: Any) -> Any:
    if value not in _GROUP_KINDS and not (is_integers([value], _MOST_CODES) and value):
        raise PackedFileError(f"its group size {value!r} is not possible")
    return value


def _tensor_from_json(name: str, value: Any, entry: Entry, *, is_small: bool) -> PlainTensor:
    if not isinstance(value, dict):
        raise PackedFileError(f"tensor '{name}' is described by {str(value)[:100]!r}")
    _, aliases = _names(name, value.get("aliases", []))
    stored = TENSOR_TYPES.parse(entry.dtype)
    dtype = TENSOR_TYPES.parse(value["dtype"]) if "dtype" in value else _widened(stored)
    if dtype != stored and not can_stand_for(stored, dtype):
        raise PackedFileError(f"tensor '{name}' of {dtype} cannot be stored as {stored}")
    tensor = PlainTensor(name, aliases, dtype, stored, entry.shape, entry.start, entry.stop)
    if tensor.is_small != is_small:
        raise PackedFileError(f"tensor '{name}' of {entry.size} bytes does not lie where tensors of its size do")
    return tensor


def _small_from_json(value: Any, section: Any, entry: Entry | None) -> tuple[tuple[PlainTensor, ...], SmallTensors | None]:
    """The small tensors, as many as the bytes of ``entry`` may stand for."""
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise PackedFileError("the header does not say what its small tensors are")
    tensors, at = [], 0
    for name, each in value.items():
        stored, shape = TENSOR_TYPES.parse(each.get("stored", "F32")), each.get("shape")
        if not is_integers(shape, SMALL_BYTES) or len(shape) > MOST_SIDES:
            raise PackedFileError(f"small tensor '{name[:100]}' has the shape {str(shape)[:100]}")
        size = math.prod(shape) * stored.itemsize
        tensors.append(_tensor_from_json(name, each, Entry(TENSOR_TYPES.name(stored), tuple(shape), at, at + size), is_small=True))
        at += size
    if not at and entry is None:
        return tuple(tensors), None
    if not is_integers(section, 1 << 48) or len(section) != 2:
        raise PackedFileError("the section of the small tensors is not described")
    if entry is None or not at or (entry.dtype, entry.shape) != ("U8", (small_size(section[0], at),)):
        raise PackedFileError(f"the header describes {at} bytes of small tensors, which the file does not hold")
    return tuple(tensors), SmallTensors(at, section[0], _crc(section[1]), entry.start, entry.stop)


def _common_from_json(value: Mapping[str, Any], entry: Entry, index: int, weight: PackedWeight) -> CommonTensor:
    found = (TENSOR_TYPES.parse(entry.dtype), entry.shape)
    if found != weight.common:
        raise PackedFileError(f"weight '{weight.spec.name}': expected a common tensor of {weight.common}, got {found}")
    return CommonTensor(index, *found, _crc(value.get("common_crc32")), entry.start, entry.stop)


def _shard_from_json(value: Mapping[str, Any], entry: Entry, index: int, weights: Sequence[PackedWeight]) -> Shard:
    spans, classes, sections = value.get("spans"), value.get("classes"), value.get("sections")
    if not _are_triples(spans, _MOST_CODES) or not _are_triples(classes, max(BINS, MAX_WIDTH + 1)) or not is_integers(sections, 1 << 48):
        raise PackedFileError(f"shard {index} is not described")
    found = tuple(Span(*each) for each in spans)
    if not found or not all(span.weight < len(weights) and span.rows for span in found):
        raise PackedFileError(f"shard {index} holds rows of weights that are not there")
    code_classes = tuple(CodeClass(*each) for each in classes)
    if not all(1 <= each.width <= MAX_WIDTH and each.first_bin <= each.last_bin < BINS for each in code_classes):
        raise PackedFileError(f"shard {index} has classes that are not possible")
    if len(sections) != SECTIONS or (entry.dtype, entry.shape) != ("U8", (shard_size(sections, found, weights),)):
        raise PackedFileError(f"shard {index} of {entry.size} bytes does not hold its sections or is too small for its rows")
    return Shard(found, ShardHead(code_classes, tuple(sections)), _crc(value.get("crc32")), entry.start, entry.stop)


def _are_triples(value: Any, limit: int) -> TypeGuard[list[list[int]]]:
    return isinstance(value, list) and all(is_integers(each, limit) and len(each) == 3 for each in value)


def _check_spans(weights: Sequence[PackedWeight], shards: Iterable[Shard]) -> None:
    """Every row of every weight must come exactly once, and in order."""
    rows = [0] * len(weights)
    for shard in shards:
        for span in shard.spans:
            if span.first_row != rows[span.weight]:
                raise PackedFileError(f"weight '{weights[span.weight].spec.name}': its rows are not in order")
            rows[span.weight] += span.rows
    for weight, found in zip(weights, rows, strict=True):
        if found != weight.layout.rows:
            raise PackedFileError(f"weight '{weight.spec.name}': expected {weight.layout.rows} rows, got {found}")
