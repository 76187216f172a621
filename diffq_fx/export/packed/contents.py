"""What of a model goes into a packed file: its stored weights, and everything else in its state_dict."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from diffq_fx.compression import Compression
from diffq_fx.errors import PackedFileError
from diffq_fx.parts import parts_of, stored_weights, unwrapped
from diffq_fx.storage import StoredWeight


@dataclass(frozen=True)
class ModelContents:
    """A converted model as a packed file sees it."""

    stored: tuple[StoredWeight, ...]
    """Every stored weight once."""
    tensors: tuple[tuple[tuple[str, ...], Tensor], ...]
    """Every other tensor of the state_dict once, with all its names."""
    modules: tuple[StoredWeight, ...] = ()
    """The stored weights as the model holds them, where their names may be those of a part."""


def contents_of(model: nn.Module) -> ModelContents:
    """The contents of a converted model.

    Args:
        model: from ``convert_diffq``, a piece of one, or a module that holds some.

    Raises:
        PackedFileError: the model is not converted, or holds something that is not a tensor.
    """
    root = unwrapped(model)
    _check_converted(root)
    modules, stored = zip(*stored_weights(root), strict=True)
    places = tuple(f"{name}." for name, m in root.named_modules(remove_duplicate=False) if isinstance(m, StoredWeight))
    rest = {name: value for name, value in root.state_dict(keep_vars=True).items() if not name.startswith(places)}
    return ModelContents(stored, tuple((names, tensor) for names, tensor in grouped_by_storage(rest)), modules)


def _check_converted(root: nn.Module) -> None:
    for part in parts_of(root, Compression).values():
        raise PackedFileError(f"the {type(part).__name__} is prepared, not converted. Call convert_diffq(model) and give its result")
    if not any(isinstance(module, StoredWeight) for module in root.modules()):
        raise PackedFileError(f"the {type(root).__name__} was never converted. Prepare, train and convert it first")


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
