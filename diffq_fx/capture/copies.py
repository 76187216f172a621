"""Copies of a model to run or trace, and what a forward changed on one."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.example import tensors_of


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """The tensor, or the ordinary tensors that a sparse one is made of."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one layout hold the same numbers."""
    return all(torch.equal(x, y) for x, y in zip(strided_parts(a), strided_parts(b), strict=True))


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Copy a model's modules and buffers, but share its Parameters: no second copy of the weights.

    Raises:
        TypeError: the model cannot be copied (``copy.deepcopy`` says why).
    """
    return copy_replacing(model, {id(parameter): parameter for parameter in model.parameters()})


def copy_replacing(model: nn.Module, replaced: Mapping[int, Tensor | nn.Module], copies: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model, with other tensors or modules (by the identity of what they replace) in the copy, wherever the model holds them.

    ``copies`` gathers the copy of every object, by the identity of what it is a copy of.

    A model may keep results of its last forward (an auxiliary loss, attention weights); torch does not copy a tensor with a
    history, so the copy gets its value.
    """
    memo: dict[int, Any] = {} if copies is None else copies
    memo.update(replaced)
    for module in model.modules():
        memo.update({id(kept): kept.detach().clone() for kept in tensors_of(list(vars(module).values())) if not kept.is_leaf})
    return copy.deepcopy(model, memo)


class ModelState:
    """What a forward may change on a model, as it is now: attributes, what lists and dicts hold, values of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(path, module, dict(vars(module))) for path, module in model.named_modules()]
        values = {id(value): value for _, _, attributes in self._modules for value in attributes.values()}
        self._containers = {key: (value, _contents(value)) for key, value in values.items() if isinstance(value, list | dict | set)}
        plain = [(f"{path}.{name}", value) for path, _, attributes in self._modules for name, value in attributes.items()]
        tensors = [*model.named_buffers(), *((name, value) for name, value in plain if isinstance(value, Tensor))]
        self._tensors = [(name.lstrip("."), tensor, tensor._version, tensor.detach().clone()) for name, tensor in tensors]

    def changes(self) -> list[str]:
        """Names of the attributes, buffers and plain tensors that are not what they were."""
        names = [name for name, tensor, version, _ in self._tensors if tensor._version != version]
        for path, module, attributes in self._modules:
            now = vars(module)
            for name in [name for name in {**attributes, **now} if not self._is_as_it_was(name, attributes, now)]:
                kept = self._containers.get(id(now.get(name))) if name in _REGISTRIES else None
                changed = _changed_entries(kept[1], now[name]) if kept else [name]
                names += [f"{path}.{each}".removeprefix(".") for each in changed]
        return names

    def _is_as_it_was(self, name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
        if name not in before or name not in now or not _same(before[name], now[name]):
            return False
        _, contents = self._containers.get(id(before[name]), (None, None))
        return contents is None or _same_contents(contents, _contents(now[name]))

    def restore(self) -> None:
        """Put everything back."""
        for _, module, attributes in self._modules:
            now = vars(module)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update(attributes)
        for value, contents in self._containers.values():
            if not _same_contents(contents, _contents(value)):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)
        with torch.no_grad():
            for _, tensor, _, value in self._tensors:
                if tensor.shape != value.shape:
                    tensor.data = value
                elif not same_values(tensor, value):  # the version does not tell: batch norm writes its statistics past it
                    tensor.detach().copy_(value)


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _changed_entries(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [name for name in {**before, **now} if before.get(name) is not now.get(name)]


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)


def _contents(value: Any) -> Any:
    """A plain copy of a list, dict or set."""
    return next(plain(value) for plain in (list, dict, set) if isinstance(value, plain))


def _same_contents(a: Any, b: Any) -> bool:
    if isinstance(a, set):
        return a == b
    pairs = zip(a, b, strict=False) if isinstance(a, list) else ((a[key], b.get(key)) for key in a)
    return len(a) == len(b) and all(_same(x, y) for x, y in pairs)


@contextmanager
def restored_state(model: nn.Module) -> Iterator[ModelState]:
    """Put attributes, buffers and the train/eval flags of a model back as they are now."""
    state = ModelState(model)
    try:
        yield state
    finally:
        state.restore()
