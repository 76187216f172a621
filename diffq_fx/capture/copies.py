"""Copies of a model to run, trace or change."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffq_fx.example import tensors_of


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Copy a model's modules and buffers, but share its Parameters: no second copy of the weights.

    Raises:
        TypeError: the model cannot be copied (``copy.deepcopy`` says why).
    """
    return copy_replacing(model, {id(parameter): parameter for parameter in model.parameters()})


def copy_replacing(model: nn.Module, replaced: Mapping[int, Tensor | nn.Module | None], copies: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model, with other tensors, modules or None (by the identity of what they replace) in the copy, wherever the model holds them.

    ``copies`` gathers the copy of every object, by the identity of what it is a copy of.

    A model may keep results of its last forward (an auxiliary loss, attention weights); torch does not copy a tensor with a
    history, so the copy gets its value. Of the empty registries of hooks, ten in each module, copy.deepcopy is slow to make others.
    """
    memo: dict[int, Any] = {} if copies is None else copies
    memo.update(replaced)
    for module in model.modules():
        memo.update({id(each): type(each)() for each in vars(module).values() if type(each) in (dict, OrderedDict) and not each})
        memo.update({id(kept): kept.detach().clone() for kept in tensors_of(list(vars(module).values())) if not kept.is_leaf})
    return copy.deepcopy(model, memo)


@contextmanager
def passing_copy(
    model: nn.Module, replaced: Mapping[int, Tensor | nn.Module | None] | None = None, copies: dict[int, Any] | None = None
) -> Iterator[nn.Module]:
    """A copy that holds no tensor afterwards: a module that refers to itself stays until the garbage collector runs, with its memory.

    A module whose class says how it is copied may share all it has with its original, or be it.
    """
    originals = {id(registry) for module in model.modules() for registry in (module._parameters, module._buffers)}
    copied = copy_replacing(model, replaced or {}, copies)
    try:
        yield copied
    finally:
        for registry in (each for module in copied.modules() for each in (module._parameters, module._buffers)):
            if id(registry) not in originals:
                registry.clear()
