"""Copies of a model to run, trace or change."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffq_fx import _compat
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
    history, so the copy gets its value. Parameters of the copy take memory of their own when one of the two is written to.
    """
    memo: dict[int, Any] = {} if copies is None else copies
    memo.update({id(own): _compat.lazy_copy(own) for own in model.parameters() if type(own) is nn.Parameter})
    memo.update(replaced)
    for module in model.modules():
        memo.update({id(kept): kept.detach().clone() for kept in tensors_of(list(vars(module).values())) if not kept.is_leaf})
    return copy.deepcopy(model, memo)


@contextmanager
def passing_copy(
    model: nn.Module, replaced: Mapping[int, Tensor | nn.Module | None] | None = None, copies: dict[int, Any] | None = None
) -> Iterator[nn.Module]:
    """A copy that holds no tensor afterwards: a module that refers to itself stays until the garbage collector runs, with its memory."""
    copied = copy_replacing(model, replaced or {}, copies)
    try:
        yield copied
    finally:
        for module in copied.modules():
            module._parameters.clear()
            module._buffers.clear()
