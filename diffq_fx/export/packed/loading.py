"""load_packed: a packed file into a float model, into a dict of tensors, or back into a converted model."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.fileformat.header import Shard
from diffq_fx.export.packed.filling import fill_converted, fill_float, fill_rows
from diffq_fx.export.packed.reading import PackedReader, in_threads
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.storage import StoredWeight

_Model = TypeVar("_Model", bound=nn.Module)


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
        TypeError: the arguments are neither of these.

    Example:
        >>> import tempfile, warnings
        >>> from diffq_fx import convert_diffq, prepare_diffq
        >>> from diffq_fx.export import load_packed, save_packed
        >>> model = torch.nn.Linear(64, 64)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     converted = convert_diffq(prepare_diffq(model, torch.zeros(1, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_packed(converted, Path(folder) / "model.safetensors")
        ...     loaded = load_packed(torch.nn.Linear(64, 64), path)
        >>> torch.equal(loaded.weight, converted.weight_quantized())
        True
    """
    into_model = isinstance(first, nn.Module)
    source = path if into_model else first
    if not isinstance(source, str | Path) or (not into_model and path is not None) or (into_model and names is not None):
        given = ", ".join(type(each).__name__ for each in (first, path) if each is not None)
        raise TypeError(f"load_packed: expected (path), (path, names=...) or (model, path), got ({given}).")
    try:
        with PackedReader(Path(source)) as reader:
            if not into_model:
                return _load_tensors(reader, names)
            (fill_converted if _is_converted(first) else fill_float)(first, reader)
            return first
    except PackedFileError as error:
        raise PackedFileError(f"load_packed: '{source}': {error}.") from error


def _is_converted(model: nn.Module) -> bool:
    if any(isinstance(module, WeightQuantizer) for module in model.modules()):
        raise PackedFileError(f"the {type(model).__name__} is prepared: load into the float model, or into a converted one")
    return any(isinstance(module, StoredWeight) for module in model.modules())


def _load_tensors(reader: PackedReader, names: Collection[str] | None) -> dict[str, Tensor]:
    """Tensors by name; each shard's codes are dropped as soon as its weights are made."""
    contents = reader.contents
    first = contents.names()
    if unknown := sorted(set(names or ()) - first.keys()):
        raise PackedFileError(f"there is no tensor '{unknown[0]}' in the file")
    wanted = {first[name] for name in (first if names is None else names)}
    found = {tensor.name: value for tensor, value in reader.plain_tensors() if tensor.name in wanted}
    specs = {weight.spec.name: weight.spec for weight in contents.weights if weight.spec.name in wanted}
    targets = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}

    def load(shard: Shard) -> None:
        for part, codes in reader.decode(shard).parts():
            if part.packed.spec.name in targets:
                fill_rows(targets[part.packed.spec.name], part, codes)

    indices = [index for index, weight in enumerate(contents.weights) if weight.spec.name in wanted]
    for _ in in_threads(load, reader.shards_of(indices)):
        pass
    found |= targets
    return {name: found[source] for name, source in first.items() if names is None or name in names}
