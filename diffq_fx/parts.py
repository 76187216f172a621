"""The prepared or converted parts of a model: the model itself, what is inside a wrapper, or several modules of a larger one."""

import copy
from dataclasses import replace

from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffq_fx.storage import StoredWeight
from diffq_fx.weights import STORED_SUFFIX

CHILD = "compression"
"""Attribute of a prepared model that is its :class:`~diffq_fx.compression.Compression`, and of a converted one that is its record."""

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that compute nothing of their own: those of torch for several processes, averages and compilation."""
    while True:
        inner = dict(model.named_children()).get("module" if isinstance(model, _WRAPPERS) else "_orig_mod")
        if inner is None:
            return model
        model = inner


def parts_of(model: nn.Module, kind: type | tuple[type, ...]) -> dict[str, nn.Module]:
    """Path -> module, for each module whose ``compression`` is of this kind, once; the path of the model itself is empty."""
    inner = unwrapped(model)
    whole = isinstance(vars(inner).get(CHILD), kind)  # nothing prepared is within a prepared model: no need to look at all modules
    modules = [next(each for each in model.named_modules() if each[1] is inner)] if whole else model.named_modules()
    return {path: module for path, module in modules if isinstance(vars(module).get(CHILD), kind) and not isinstance(module, StoredWeight)}


def parameters_outside(model: nn.Module, parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a model that belong to none of its parts: a head of the wrapper's own."""
    if unwrapped(model) in parts.values():
        return {}
    inside = {id(parameter) for part in parts.values() for parameter in part.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}


def stored_weights(model: nn.Module) -> list[tuple[StoredWeight, StoredWeight]]:
    """Every stored weight of a model once, and beside it the same under the names that it has in this model.

    A weight knows its names in the model that was converted; in a larger one they begin with the path of that.
    """
    names: dict[int, list[str]] = {}
    modules: dict[int, StoredWeight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StoredWeight):
            modules[id(module)] = module
            names.setdefault(id(module), []).append(path)
    return [(module, _renamed(module, names[key])) for key, module in modules.items()]


def _renamed(stored: StoredWeight, paths: list[str]) -> StoredWeight:
    found = [path.removesuffix(STORED_SUFFIX) for path in paths if path.endswith(STORED_SUFFIX)]
    if not found or set(found) == set(stored.spec.names):
        return stored
    name, *aliases = found
    renamed = copy.copy(stored)
    renamed.spec = replace(stored.spec, name=name, aliases=tuple(aliases))
    return renamed
