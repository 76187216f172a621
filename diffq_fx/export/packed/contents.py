"""What of a model goes into a packed file: its stored weights, and everything else in its state_dict."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from diffq_fx.compression import Compression
from diffq_fx.convert import CompressionRecord
from diffq_fx.errors import PackedFileError
from diffq_fx.passes._graph import STORED_SUFFIX
from diffq_fx.prepare import CHILD
from diffq_fx.storage import StoredWeight


@dataclass(frozen=True)
class ModelContents:
    """A converted model as a packed file sees it."""

    stored: tuple[StoredWeight, ...]
    """Every stored weight once."""
    tensors: tuple[tuple[tuple[str, ...], Tensor], ...]
    """Every other tensor of the state_dict once, with all its names."""


def contents_of(model: nn.Module) -> ModelContents:
    """The contents of a converted model.

    Args:
        model: from ``convert_diffq``; a wrapper such as DistributedDataParallel is looked through.

    Raises:
        PackedFileError: the model is not converted, or holds something that is not a tensor.
    """
    root = _converted_root(model)
    stored = list({id(m): m for m in root.modules() if isinstance(m, StoredWeight)}.values())
    for weight in stored:
        for name in weight.spec.names:
            if dict(root.named_modules(remove_duplicate=False)).get(name + STORED_SUFFIX) is not weight:
                raise PackedFileError(f"weight '{name}' is not where convert_diffq has put it: give the whole converted model")
    places = tuple(f"{name}." for name, m in root.named_modules(remove_duplicate=False) if isinstance(m, StoredWeight))
    rest = {name: value for name, value in root.state_dict(keep_vars=True).items() if not name.startswith(places)}
    return ModelContents(tuple(stored), tuple((names, tensor) for names, tensor in grouped_by_storage(rest)))


def _converted_root(model: nn.Module) -> nn.Module:
    """The converted model: the model itself, or the one inside its wrapper."""
    for module in model.modules():
        record = vars(module).get(CHILD)
        if isinstance(record, CompressionRecord):
            return module
        if isinstance(record, Compression):
            raise PackedFileError(f"the {type(module).__name__} is prepared, not converted. Call convert_diffq(model) and give its result")
    if any(isinstance(module, StoredWeight) for module in model.modules()):
        return model
    raise PackedFileError(f"the {type(model).__name__} was never converted. Prepare, train and convert it first")


def grouped_by_storage(tensors: dict[str, Any]) -> list[tuple[tuple[str, ...], Tensor]]:
    """Tensors that are one and the same, with all their names.

    Raises:
        PackedFileError: one of them is not a plain tensor.
    """
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
