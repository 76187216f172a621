"""load_packed: a packed file into a float model, into a dict of tensors, or back into a converted model.

First comes everything that can fail, then everything that changes a model.
"""

import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.reader import PackedReader, in_threads, opened
from diffq_fx.export.packed.shards import DecodedShard, ShardPart
from diffq_fx.export.packed.unpacking import DecodedPart
from diffq_fx.export.packed.weight_kind import PackedWeight
from diffq_fx.export.packed.writer import NamedTensors, grouped_by_storage, model_contents
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.parts import unwrapped
from diffq_fx.storage import StoredWeight

_Model = TypeVar("_Model", bound=nn.Module)
_FEW = 1 << 14  # values that torch copies without waking its other threads, which this thread does not own
_SHOWN = 5


@overload
def load_packed(source: str | Path, /, *, names: Collection[str] | None = None) -> dict[str, Tensor]: ...
@overload
def load_packed(model: _Model, path: str | Path, /) -> _Model: ...


def load_packed(first: Any, path: str | Path | None = None, /, *, names: Collection[str] | None = None) -> Any:
    """Load a file that :func:`save_packed` has written.

    ``load_packed(path)`` gives the state_dict of the float model, ``load_packed(path, names=[...])`` a few of its tensors, read without
    the rest. ``load_packed(model, path)`` fills a model in place, whole or not at all:

    - a plain float model (no quantizer, no fx): its weights become, bit by bit, those that the converted model computes with;
    - a converted model of the same architecture, such as ``convert_diffq(prepare_diffq(model, example))`` of an untrained one: its
      weights become the file's integers, ready for ``export_onnx``.

    Nothing in the file is executed, and nothing is believed: every byte is covered by a checksum, and shapes are compared with the size of
    the file and with the model before anything is allocated.

    Args:
        first: the model, or the path where only tensors are wanted.
        path: the file.
        names: which tensors; all of them by default. Not for a model.

    Returns:
        The model, in the mode that it was in; or tensors by name, where the names of a tied weight share one tensor.

    Raises:
        PackedFileError: the file is missing, damaged, not a packed file, of a newer version, or of another architecture. The model is
            as it was.
        TypeError: the arguments are neither of these, or ``names`` is one name instead of several.

    Example:
        >>> import tempfile
        >>> from diffq_fx import convert, prepare
        >>> from diffq_fx.export import load_packed, save_packed
        >>> from diffq_fx.methods import STE
        >>> converted = convert(prepare(torch.nn.Linear(64, 64), torch.zeros(1, 64), STE(bits=4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_packed(converted, Path(folder) / "model.safetensors")
        ...     loaded = load_packed(torch.nn.Linear(64, 64), path)
        >>> torch.equal(loaded.weight, converted.weight_quantized())
        True
    """
    into_model = isinstance(first, nn.Module)
    source = path if into_model else first
    if not isinstance(source, str | os.PathLike) or (not into_model and path is not None) or (into_model and names is not None):
        given = ", ".join(type(each).__name__ for each in (first, path) if each is not None)
        raise TypeError(f"load_packed: expected (path), (path, names=...) or (model, path), got ({given}).")
    _check_names(names)
    try:
        with opened(Path(source)) as reader:
            if not into_model:
                return _load_tensors(reader, names)
            _fill_model(unwrapped(first), reader)
            return first
    except PackedFileError as error:
        raise PackedFileError(f"load_packed: {error}") from error


def stored_weights_of(data: bytes) -> list[StoredWeight]:
    """The stored weights in the bytes of a packed file; an error as for :func:`load_packed`, which does not name the file."""
    reader = PackedReader(io.BytesIO(data))
    return list(_restored(reader.contents.weights, map(reader.decode, reader.contents.shards)).values())


def _check_names(names: Any) -> None:
    if isinstance(names, str):
        raise TypeError(f"load_packed: names must be a collection of names such as ['{names}'], got the text '{names}'.")
    if names is not None and (isinstance(names, bytes) or not isinstance(names, Collection)):
        raise TypeError(f"load_packed: names must be a collection of names, got {type(names).__name__}.")
    for name in names or ():
        if not isinstance(name, str):
            raise TypeError(f"load_packed: names must be a collection of names, got {name!r} among them.")


def _is_converted(model: nn.Module) -> bool:
    if any(isinstance(module, WeightQuantizer) for module in model.modules()):
        raise PackedFileError(f"the {type(model).__name__} is prepared: load into the float model, or into a converted one")
    return any(isinstance(module, StoredWeight) for module in model.modules())


def _load_tensors(reader: PackedReader, names: Collection[str] | None) -> dict[str, Tensor]:
    """Tensors by name; each shard's codes are dropped as soon as its weights are made."""
    contents = reader.contents
    first = contents.names()
    if unknown := sorted(set(names or ()) - first.keys()):
        raise PackedFileError(f"there is no tensor '{unknown[0]}' in the file; it has {_some(sorted(first))}")
    wanted = {first[name] for name in (first if names is None else names)}
    found = {tensor.names[0]: value for tensor, value in reader.plain_tensors() if tensor.names[0] in wanted}
    weights = {index: each.spec for index, each in enumerate(contents.weights) if each.spec.name in wanted}
    made = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in weights.values()}
    fill = _filling({name: [tensor] for name, tensor in made.items()})
    shards = [shard for shard in contents.shards if any(span.weight in weights for span in shard.spans)]
    for _ in in_threads(lambda shard: fill(reader.decode(shard)), shards):
        pass
    found |= made
    return {name: found[source] for name, source in first.items() if names is None or name in names}


def _fill_model(model: nn.Module, reader: PackedReader) -> None:
    """Fill a float model, or put integers in the place of a converted one's; whole or not at all."""
    contents, is_converted = reader.contents, _is_converted(model)
    weights, tensors = model_contents(model) if is_converted else ([], grouped_by_storage(model.state_dict(keep_vars=True)))
    facts = {tensor.names: (tensor.shape, tensor.dtype) for tensor in contents.tensors}
    if is_converted:
        _refuse_other_weights([stored for _, stored in weights], contents.weights)
    else:
        facts |= {weight.spec.names: (weight.spec.shape, weight.spec.dtype) for weight in contents.weights}
    targets = _targets(tensors, facts, type(model).__name__)
    plain, shards = reader.plain_tensors(), list(in_threads(reader.decode, contents.shards))  # all is sound, and takes a byte a code
    restored = _restored(contents.weights, shards) if is_converted else {}
    for tensor, value in plain:
        for target in targets[tensor.names[0]]:
            target.copy_(value)
    if is_converted:
        _replace_modules(model, weights, restored)
        return
    for _ in in_threads(_filling(targets), shards):
        pass
    for target in (each for group in targets.values() for each in group):
        torch.autograd.graph.increment_version(target)  # numpy has written past it


def _restored(weights: Sequence[PackedWeight], shards: Iterable[DecodedShard]) -> dict[str, StoredWeight]:
    parts: dict[str, list[DecodedPart]] = {weight.spec.name: [] for weight in weights}
    for shard in shards:
        for part, codes in shard.parts():
            parts[part.packed.spec.name].append(codes)
    return {weight.spec.name: weight.restore(parts.pop(weight.spec.name)) for weight in weights}


def _filling(targets: Mapping[str, Sequence[Tensor]]) -> Callable[[DecodedShard], None]:
    """A function that writes the weights of a shard into their tensors, by the file's first names."""

    def fill(shard: DecodedShard) -> None:
        for part, codes in shard.parts():
            for target in targets.get(part.packed.spec.name, ()):
                _fill_rows(target, part, codes)

    return fill


def _fill_rows(target: Tensor, part: ShardPart, codes: DecodedPart) -> None:
    """Write the weights of a part into the rows of a tensor that they belong to."""
    axis = part.packed.spec.axis
    direct = target.dtype == torch.float32 and target.device.type == "cpu" and target.is_contiguous() and axis == 0
    out: NDArray[np.float32] | None = target.detach().reshape(len(target), -1).numpy()[part.rows] if direct else None
    rows_OI = part.packed.weight_rows(codes, out)
    if rows_OI is None:
        return
    step = max(_FEW // max(rows_OI.shape[1], 1), 1)
    places = target.movedim(axis, 0)
    for first in range(0, len(rows_OI), step):
        some = rows_OI[first : first + step]
        place = places[part.rows.start + first : part.rows.start + first + len(some)]
        place.copy_(some.reshape(place.shape))


def _targets(
    tensors: NamedTensors, facts: Mapping[tuple[str, ...], tuple[tuple[int, ...], torch.dtype]], model: str
) -> dict[str, list[Tensor]]:
    """The tensors of a model that each tensor of a file goes to, by the file's first name.

    An error if names, shapes or types differ, or the model ties tensors that the file holds apart, or places of one tensor.
    """
    first = {name: names[0] for names in facts for name in names}
    own = {name for names, _ in tensors for name in names}
    if unknown := sorted(own - first.keys()):
        raise PackedFileError(f"the file has no {_some(unknown)}, which the {model} has")
    if missing := sorted(first.keys() - own):
        raise PackedFileError(f"the {model} has no {_some(missing)}, which the file has")
    targets: dict[str, list[Tensor]] = {names[0]: [] for names in facts}
    wanted = {names[0]: fact for names, fact in facts.items()}
    for names, tensor in tensors:
        source, *others = {first[name] for name in names}
        if others:
            raise PackedFileError(f"the model ties {' and '.join(sorted(names))}, which the file holds as different tensors")
        shape, dtype = wanted[source]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise PackedFileError(f"tensor '{names[0]}': the model has {tuple(tensor.shape)} {tensor.dtype}, the file {shape} {dtype}")
        if 1 + sum((size - 1) * step for size, step in zip(shape, tensor.stride(), strict=True)) < tensor.numel():
            raise PackedFileError(
                f"tensor '{names[0]}' of the model is expanded: its places share memory, give it some of its own by clone()"
            )
        targets[source].append(tensor)
    return targets


def _refuse_other_weights(own: Iterable[Any], files: Iterable[Any]) -> None:
    """Refuse a converted model whose quantized weights are not those of a file."""
    stored, packed = (
        {each.spec.name: {key: getattr(each.spec, key) for key in ("names", "shape", "axis", "dtype")} for each in weights}
        for weights in (own, files)
    )
    for name in sorted(stored.keys() | packed.keys()):
        if name not in stored or name not in packed:
            where, other = ("file", "converted model") if name in packed else ("converted model", "file")
            raise PackedFileError(f"weight '{name}' is quantized in the {where}, but not in the {other}")
        if stored[name] != packed[name]:
            raise PackedFileError(f"weight '{name}': the model has {stored[name]}, the file {packed[name]}")


def _replace_modules(model: nn.Module, weights: Iterable[tuple[StoredWeight, StoredWeight]], restored: Mapping[str, StoredWeight]) -> None:
    """Put other stored weights in the place of those of a model, under every name; they keep the names that they had in their part."""
    replaced = {id(module): restored[stored.spec.name] for module, stored in weights}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, StoredWeight):
                new = replaced[id(child)]
                new.spec = replace(new.spec, name=child.spec.name, aliases=child.spec.aliases)
                parent._modules[name] = new.to(next(child.buffers()).device).train(child.training)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more
