"""What a packed file says of itself: weights, plain tensors and shards, written as JSON and read with every value checked.

``docs/packed-format.md`` is the schema.
"""

import math
import zlib
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch

from diffq_fx.budget.entropy import SMALL_BYTES
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.classes import BINS, MAX_WIDTH, CodeClass
from diffq_fx.export.packed.codebook_kind import PackedCodebook
from diffq_fx.export.packed.container import MOST_BYTES, RESERVED, Container, Entry, is_integers, is_shape
from diffq_fx.export.packed.dtypes import FLOAT_TYPES, TENSOR_TYPES, can_stand_for, tensor_of
from diffq_fx.export.packed.integer_kind import PackedIntegers
from diffq_fx.export.packed.shards import SECTIONS, Shard, Span, shard_size
from diffq_fx.export.packed.weight_kind import PackedWeight
from diffq_fx.weights import WeightSpec

KINDS: tuple[type[PackedWeight], ...] = (PackedIntegers, PackedCodebook)
"""The kinds of stored weights that a packed file can hold; a new kind is one more here."""
SMALL_NAME = f"{RESERVED}small"
"""Name of the small tensors in the container."""

_GROUP_KINDS = ("tensor", "channel")
_GRIDS = ("affine", "half", "symmetric", "float")
_MOST_CODES = 1 << 40
ITS_OWN = ("name", "aliases", "kind", "shape", "common_crc32")  # what no weight leaves to the defaults of its kind


class PlainTensor(NamedTuple):
    """A tensor that is stored as it is."""

    names: tuple[str, ...]
    dtype: torch.dtype  # in the model; in the file it may be a smaller one that holds the same values
    stored_dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # first byte, counted from the first byte of all small tensors where it is small, else as the container counts
    stop: int

    @property
    def is_small(self) -> bool:
        """Whether it lies together with others."""
        return self.stop - self.start < SMALL_BYTES


class SmallTensors(NamedTuple):
    """Where all small plain tensors lie: ``size`` bytes, coded, then zeros; the checksum is that of both."""

    size: int
    coded_size: int
    crc32: int
    start: int
    stop: int


class Contents(NamedTuple):
    """Everything that a packed file's header says."""

    weights: tuple[PackedWeight, ...]
    tensors: tuple[PlainTensor, ...]
    tensors_crc32: int  # of the bytes of all plain tensors that are not small, in file order
    small: SmallTensors | None
    shards: tuple[Shard, ...]

    def names(self) -> dict[str, str]:
        """The first name of each tensor or weight, by every name; an error if two have one name."""
        every = [weight.spec.names for weight in self.weights] + [tensor.names for tensor in self.tensors]
        found = {name: names[0] for names in every for name in names}
        if len(found) != sum(map(len, every)):
            flat = [name for names in every for name in names]
            raise PackedFileError(f"two tensors have one name, '{max(flat, key=flat.count)}'")
        return found


def shard_name(index: int) -> str:
    """Name of a shard's tensor in the container."""
    return f"{RESERVED}shard/{index}"


def common_name(weight: int) -> str:
    """Name of the common tensor of a weight in the container."""
    return f"{RESERVED}common/{weight}"


def small_size(coded_size: int, size: int) -> int:
    """Bytes of the container's tensor that holds so many bytes of small tensors: one for 128 of them or more."""
    return max(coded_size, -(-size // 128))


def type_in_model(dtype: torch.dtype) -> torch.dtype:
    """The type that a tensor of this stored type has in the model, unless the header says otherwise."""
    return torch.float32 if dtype == torch.float16 else dtype


def read_contents(container: Container) -> Contents:
    """Read the contents and the common tensors, all checked against each other and the tensors of the container.

    An error if something is missing, not possible, or does not fit; nothing of a declared size has been allocated.
    """
    value, entries = container.described, container.entries
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
    commons = {common_name(index): index for index, weight in enumerate(weights) if weight.common_type}
    ours = {*commons, *(shard_name(index) for index in range(len(found))), *([SMALL_NAME] if small else [])}
    if entries.keys() - plain.keys() != ours:
        raise PackedFileError(f"the header describes {len(found)} shards and {len(commons)} common tensors, the file has others")
    shards = tuple(_shard_from_json(each, entries[shard_name(index)], index, weights) for index, each in enumerate(found))
    _check_spans(weights, shards)
    contents = Contents(weights, tensors + small_tensors, _crc(value.get("tensors_crc32")), small, shards)
    contents.names()
    for name, index in commons.items():
        _read_common(container, entries[name], weights[index], _crc(weight_values[index].get("common_crc32")))
    return contents


def _with_defaults(weights: Sequence[dict[str, Any]], defaults: Any) -> list[Mapping[str, Any]]:
    """Weights with what they leave to the defaults of their kind."""
    if not isinstance(defaults, dict) or not all(isinstance(each, dict) and each.keys().isdisjoint(ITS_OWN) for each in defaults.values()):
        raise PackedFileError("the header has no defaults of its weights, or some that a weight must say itself")
    kinds = [each.get("kind") for each in weights]
    return [ChainMap(each, defaults.get(kind, {}) if isinstance(kind, str) else {}) for each, kind in zip(weights, kinds, strict=True)]


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise PackedFileError(f"the header has no list of {key}")
    return found


def _crc(value: Any) -> int:
    if not is_integers([value], 1 << 32):
        raise PackedFileError("a checksum is missing in the header")
    return value


def _names(name: Any, aliases: Any) -> tuple[str, ...]:
    if not isinstance(aliases, list) or not all(isinstance(each, str) for each in (name, *aliases)):
        raise PackedFileError(f"a tensor's name {str(name)[:100]!r} or aliases {str(aliases)[:100]!r} are not text")
    return (name, *aliases)


def _weight_from_json(value: Mapping[str, Any]) -> PackedWeight:
    name, *aliases = _names(value.get("name"), value.get("aliases", []))
    try:
        kind = next((kind for kind in KINDS if kind.kind == value.get("kind")), None)
        if kind is None:
            known = " and ".join(kind.kind for kind in KINDS)
            raise PackedFileError(f"its kind {value.get('kind')!r} is not known here; {known} are")
        shape, axis, grid, consumer = (value.get(key) for key in ("shape", "axis", "grid", "consumer"))
        if not is_shape(shape, _MOST_CODES) or not 0 < math.prod(shape) <= _MOST_CODES or not shape:
            raise PackedFileError(f"its shape {str(shape)[:100]} is not possible")
        if not isinstance(axis, int) or not is_integers([axis], len(shape)) or grid not in _GRIDS or not isinstance(consumer, str):
            raise PackedFileError(f"its axis {axis!r}, grid {grid!r} or consumer {consumer!r} is not possible")
        sizes = {key: _group_size(value.get(key)) for key in ("group_size", "range_size")}
        place: dict[str, Any] = {"name": name, "aliases": tuple(aliases), "shape": tuple(shape), "axis": axis}
        spec = WeightSpec(**place, **sizes, dtype=FLOAT_TYPES.parse(value.get("dtype")), grid=grid, consumer=consumer)
        return kind.of_facts(spec, value)
    except PackedFileError as error:
        raise PackedFileError(f"weight '{name}': {error}") from error


def _group_size(value: Any) -> Any:
    if value not in _GROUP_KINDS and not (is_integers([value], _MOST_CODES) and value):
        raise PackedFileError(f"its group size {value!r} is not possible")
    return value


def _tensor_from_json(name: str, value: Any, entry: Entry, *, is_small: bool) -> PlainTensor:
    if not isinstance(value, dict):
        raise PackedFileError(f"tensor '{name}' is described by {str(value)[:100]!r}")
    names, stored = _names(name, value.get("aliases", [])), TENSOR_TYPES.parse(entry.dtype)
    dtype = TENSOR_TYPES.parse(value["dtype"]) if "dtype" in value else type_in_model(stored)
    if dtype != stored and not can_stand_for(stored, dtype):
        raise PackedFileError(f"tensor '{name}' of {dtype} cannot be stored as {stored}")
    tensor = PlainTensor(names, dtype, stored, entry.shape, entry.start, entry.stop)
    if tensor.is_small != is_small:
        raise PackedFileError(f"tensor '{name}' of {entry.stop - entry.start} bytes does not lie where tensors of its size do")
    return tensor


def _small_from_json(value: Any, section: Any, entry: Entry | None) -> tuple[tuple[PlainTensor, ...], SmallTensors | None]:
    """The small tensors, as many as the bytes of ``entry`` may stand for."""
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise PackedFileError("the header does not say what its small tensors are")
    tensors, at = [], 0
    for name, each in value.items():
        stored, shape = TENSOR_TYPES.parse(each.get("stored", "F32")), each.get("shape")
        if not is_shape(shape, SMALL_BYTES):
            raise PackedFileError(f"small tensor '{name[:100]}' has the shape {str(shape)[:100]}")
        size = math.prod(shape) * stored.itemsize
        tensors.append(_tensor_from_json(name, each, Entry(TENSOR_TYPES.name(stored), tuple(shape), at, at + size), is_small=True))
        at += size
    if not at and entry is None:
        return tuple(tensors), None
    if not is_integers(section, MOST_BYTES, 2):
        raise PackedFileError("the section of the small tensors is not described")
    if entry is None or not at or entry[:2] != ("U8", (small_size(section[0], at),)):
        raise PackedFileError(f"the header describes {at} bytes of small tensors, which the file does not hold")
    return tuple(tensors), SmallTensors(at, section[0], _crc(section[1]), entry.start, entry.stop)


def _shard_from_json(value: Mapping[str, Any], entry: Entry, index: int, weights: Sequence[PackedWeight]) -> Shard:
    spans, classes, sections = value.get("spans"), value.get("classes"), value.get("sections")
    if not (_are_triples(spans, _MOST_CODES) and _are_triples(classes, BINS) and is_integers(sections, MOST_BYTES, SECTIONS)):
        raise PackedFileError(f"shard {index} is not described")
    found, code_classes = tuple(Span(*each) for each in spans), tuple(CodeClass(*each) for each in classes)
    if not found or not all(span.weight < len(weights) and span.rows for span in found):
        raise PackedFileError(f"shard {index} holds rows of weights that are not there")
    if not all(1 <= each.width <= MAX_WIDTH and each.first_bin <= each.last_bin < BINS for each in code_classes):
        raise PackedFileError(f"shard {index} has classes that are not possible")
    if entry[:2] != ("U8", (shard_size(sections, found, weights),)):
        raise PackedFileError(f"shard {index} of {entry.stop - entry.start} bytes does not hold its sections or is too small for its rows")
    return Shard(found, code_classes, tuple(sections), _crc(value.get("crc32")), entry.start, entry.stop)


def _are_triples(value: Any, limit: int) -> TypeGuard[list[list[int]]]:
    return isinstance(value, list) and all(is_integers(each, limit, 3) for each in value)


def _check_spans(weights: Sequence[PackedWeight], shards: Sequence[Shard]) -> None:
    """Every row of every weight must come exactly once, and in order."""
    rows = [0] * len(weights)
    for span in (span for shard in shards for span in shard.spans):
        if span.first_row != rows[span.weight]:
            raise PackedFileError(f"weight '{weights[span.weight].spec.name}': its rows are not in order")
        rows[span.weight] += span.rows
    for weight, found in zip(weights, rows, strict=True):
        if found != weight.layout.rows:
            raise PackedFileError(f"weight '{weight.spec.name}': expected {weight.layout.rows} rows, got {found}")


def _read_common(container: Container, entry: Entry, weight: PackedWeight, crc32: int) -> None:
    found, name = (TENSOR_TYPES.parse(entry.dtype), entry.shape), weight.spec.name
    if found != weight.common_type:
        raise PackedFileError(f"weight '{name}': expected a common tensor of {weight.common_type}, got {found}")
    data = container.read(entry.start, entry.stop)
    if zlib.crc32(data) != crc32:
        raise PackedFileError(f"is damaged: the checksum of the codebook of '{name}' does not fit")
    weight.common = tensor_of(data, *found)
