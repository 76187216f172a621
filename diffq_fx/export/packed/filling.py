"""Fills the tensors of a model from a packed file: first everything that can fail, then everything that changes the model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.contents import contents_of, grouped_by_storage
from diffq_fx.export.packed.fileformat.header import Contents
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.export.packed.kinds.decoded import DecodedPart, PartCodes
from diffq_fx.export.packed.reading import PackedReader, in_threads
from diffq_fx.export.packed.shard_reading import DecodedShard
from diffq_fx.export.packed.shards import Part
from diffq_fx.storage import StoredWeight

_FEW = 1 << 14  # values that torch copies without waking its other threads, which this thread does not own
_SHOWN = 5

_Facts = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor of a file, by its first name."""


def fill_float(model: nn.Module, reader: PackedReader) -> None:
    """Fill a float model, whole or not at all.

    Raises:
        PackedFileError: the model has other names, shapes or types than the file, or the file is damaged.
    """
    contents, state = reader.contents, model.state_dict(keep_vars=True)
    _refuse_other_names(list(state), list(contents.names()), type(model).__name__)
    facts = {**{w.spec.name: (w.spec.shape, w.spec.dtype) for w in contents.weights}, **_facts_of_tensors(contents)}
    targets = _targets(state, contents, facts)
    plain = reader.plain_tensors()
    shards = _decode_all(reader)

    def fill(shard: DecodedShard) -> None:
        for part, codes in shard.parts():
            for target in targets[part.packed.spec.name]:
                fill_rows(target, part, codes)

    for tensor, value in plain:
        for target in targets[tensor.name]:
            target.copy_(value)
    for _ in in_threads(fill, shards):
        pass
    for target in (each for group in targets.values() for each in group):
        torch.autograd.graph.increment_version(target)  # numpy has written past it


def fill_converted(model: nn.Module, reader: PackedReader) -> None:
    """Put a file's integers in the place of those of a converted model and fill its other tensors, whole or not at all.

    Raises:
        PackedFileError: the model has other weights, names, shapes or types than the file, or the file is damaged.
    """
    contents, existing = reader.contents, contents_of(model)
    _refuse_other_weights(existing.stored, contents.weights)
    rest = {name: tensor for names, tensor in existing.tensors for name in names}
    _refuse_other_names(list(rest), [name for tensor in contents.tensors for name in tensor.names], type(model).__name__)
    targets = _targets(rest, contents, _facts_of_tensors(contents))
    plain = reader.plain_tensors()
    parts: dict[str, list[PartCodes]] = {weight.spec.name: [] for weight in contents.weights}
    for shard in _decode_all(reader):
        for part, codes in shard.parts():
            parts[part.packed.spec.name].append(codes.assembled())
    restored = {weight.spec.name: weight.restore(parts.pop(weight.spec.name)) for weight in contents.weights}
    for tensor, value in plain:
        for target in targets[tensor.name]:
            target.copy_(value)
    for module, stored in zip(existing.modules, existing.stored, strict=True):
        restored[stored.spec.name].spec = replace(restored[stored.spec.name].spec, name=module.spec.name, aliases=module.spec.aliases)
    _replace_modules(model, {id(m): restored[stored.spec.name] for m, stored in zip(existing.modules, existing.stored, strict=True)})


def fill_rows(target: Tensor, part: Part, codes: DecodedPart) -> None:
    """Write the weights of a part into the rows of a tensor that they belong to."""
    axis = part.packed.spec.axis
    direct = target.dtype == torch.float32 and target.device.type == "cpu" and target.is_contiguous() and axis == 0
    out: NDArray[np.float32] | None = target.reshape(len(target), -1).numpy()[part.rows] if direct else None
    rows_OI = part.packed.weight_rows(codes, out)
    if rows_OI is None:
        return
    step = max(_FEW // max(rows_OI.shape[1], 1), 1)
    places = target.movedim(axis, 0)
    for first in range(0, len(rows_OI), step):
        some = rows_OI[first : first + step]
        place = places[part.rows.start + first : part.rows.start + first + len(some)]
        place.copy_(some.reshape(place.shape))


def _decode_all(reader: PackedReader) -> list[DecodedShard]:
    """Every shard of the file, decoded and so known to be sound; a code takes a byte of memory or less."""
    return list(in_threads(reader.decode, reader.contents.shards))


def _facts_of_tensors(contents: Contents) -> _Facts:
    return {tensor.name: (tensor.shape, tensor.dtype) for tensor in contents.tensors}


def _targets(state: Mapping[str, Tensor], contents: Contents, facts: _Facts) -> dict[str, list[Tensor]]:
    """The tensors of a model that each tensor of a file goes to, by the file's first name.

    Raises:
        PackedFileError: shapes or types differ, or the model ties tensors that the file holds apart.
    """
    first = contents.names()
    targets: dict[str, list[Tensor]] = {}
    for names, tensor in grouped_by_storage(dict(state)):
        sources = {first[name] for name in names}
        if len(sources) > 1:
            raise PackedFileError(f"the model ties {' and '.join(sorted(names))}, which the file holds as different tensors")
        source = sources.pop()
        shape, dtype = facts[source]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise PackedFileError(f"tensor '{names[0]}': the model has {tuple(tensor.shape)} {tensor.dtype}, the file {shape} {dtype}")
        targets.setdefault(source, []).append(tensor)
    return targets


def _refuse_other_names(own: Sequence[str], files: Sequence[str], model: str) -> None:
    """Refuse a model that has other tensors than a file."""
    if unknown := sorted(set(own) - set(files)):
        raise PackedFileError(f"the file has no {_some(unknown)}, which the {model} has")
    if missing := sorted(set(files) - set(own)):
        raise PackedFileError(f"the {model} has no {_some(missing)}, which the file has")


def _refuse_other_weights(own: Iterable[StoredWeight], files: Iterable[PackedWeight]) -> None:
    """Refuse a converted model whose quantized weights are not those of a file."""

    def described(spec: object) -> dict[str, object]:
        return {key: getattr(spec, key) for key in ("names", "shape", "axis", "dtype")}

    stored = {weight.spec.name: described(weight.spec) for weight in own}
    packed = {weight.spec.name: described(weight.spec) for weight in files}
    for name in sorted(stored.keys() | packed.keys()):
        if name not in stored or name not in packed:
            where, other = ("file", "converted model") if name in packed else ("converted model", "file")
            raise PackedFileError(f"weight '{name}' is quantized in the {where}, but not in the {other}")
        if stored[name] != packed[name]:
            raise PackedFileError(f"weight '{name}': the model has {stored[name]}, the file {packed[name]}")


def _replace_modules(model: nn.Module, replaced: Mapping[int, StoredWeight]) -> None:
    """Put other stored weights in the place of those of a model, under every name."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, StoredWeight) and id(child) in replaced:
                device = next(child.buffers()).device
                parent._modules[name] = replaced[id(child)].to(device).train(child.training)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more
