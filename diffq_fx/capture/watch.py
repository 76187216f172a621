"""What a graph of a whole model depends on beside tensors: all that Python read while it was traced, and hooks.

The graph does not read them again. Each forward compares them with what they were: after a change the model runs its original forward,
in which every module makes its own weights.
"""

import itertools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from diffq_fx.capture.contents import can_change_in_place, contents_of, is_unchanged, same
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), *dir(nn.Module)}) - {"_modules", "forward"}


class _Absent:
    """In place of the value of an attribute that is not there; a class, since its copies and pickles are itself."""


class _Fact(NamedTuple):
    """What a module had under a name that was read: an attribute of its own, a child, or neither."""

    path: str
    module: nn.Module
    is_child: bool
    name: str
    value: Any
    contents: tuple[Any, ...] = ()
    """What the value held, if it can change in place."""


def _children(module: nn.Module) -> dict[str, nn.Module | None]:
    return {name: child for name, child in module._modules.items() if not name.endswith((QUANTIZER_SUFFIX, STORED_SUFFIX))}


def runs_foreign_code(module: nn.Module) -> bool:
    """Whether a call of a module runs code that is not torch's."""
    return type(module).__module__.partition(".")[0] != "torch" or "forward" in vars(module) or any(vars(module)[kind] for kind in HOOKS)


@dataclass
class GraphUse:
    """Whether a model's graph still stands for its forward."""

    ended_by: str = ""
    """What was changed; empty while the graph is used."""
    facts: list[_Fact] = field(default_factory=list)
    """Compared by identity."""
    changeable: list[_Fact] = field(default_factory=list)
    """Compared by what they hold, since they can change in place."""
    containers: list[tuple[str, nn.Module, dict[str, nn.Module | None]]] = field(default_factory=list)
    """Modules whose children the forward asked for, whatever they are: path, module, children."""
    run_through: list[tuple[str, nn.Module]] = field(default_factory=list)
    """Modules that the graph does not call: no hook on them would fire."""
    weights_within: str = ""
    """What was read and holds weights to quantize, such as a list: the original forward would find the float ones in it."""
    may_change_within: bool = False
    """Whether a module that the graph calls could change what was read, so that it is compared after the graph too."""
    on_classes: dict[tuple[type, str], tuple[Any, ...]] = field(default_factory=dict)
    """What was read and belongs to a class, methods included; an object that can change in place by what it held."""
    _flat: tuple[list[Any], ...] = ()
    """The facts, and then the hooks, as lists to compare in one go: at every forward there are hundreds."""

    def note(self, path: str, module: nn.Module, names: frozenset[str], *, is_run_through: bool) -> None:
        """Note what a module has under the names that were read.

        Raises:
            CaptureError: it holds something whose changes could not be seen.
        """
        own, where = vars(module), path or "the model"
        if is_run_through and path:
            self.run_through.append((where, module))
        if "_modules" in names:
            self.containers.append((where, module, _children(module)))
        for name in sorted(names - {"_modules"}):
            is_child = name in module._modules
            if name not in own and hasattr(type(module), name):
                self._note_class(type(module), name)
            if not path and name == "forward":  # wrappers of a whole model set its forward, and call the one that it had
                continue
            fact = _Fact(where, module, is_child, name, (module._modules if is_child else own).get(name, _Absent))
            if can_change_in_place(own.get(name)):
                self.changeable.append(fact._replace(contents=contents_of(fact.value, f"{path}.{name}".removeprefix("."))))
            else:
                self.facts.append(fact)

    def _note_class(self, cls: type, name: str) -> None:
        value = _on_class(cls, name)
        is_plain = hasattr(type(value), "__get__") or not can_change_in_place(value)
        self.on_classes[cls, name] = (value,) if is_plain else contents_of(value, name)

    def stands(self) -> bool:
        """Whether nothing was changed that the graph depends on. A compiled model is what it was when it was compiled."""
        if not self.ended_by and not torch.compiler.is_dynamo_compiling():
            self.ended_by = next(self._changes(), "")
        return not self.ended_by

    def _changes(self) -> Iterator[str]:
        if not self._flat:
            dicts = [vars(each.module)["_modules"] if each.is_child else vars(each.module) for each in self.facts]
            hooks = [(vars(module), kind) for _, module in self.run_through for kind in HOOKS]
            self._flat = (
                dicts,
                [each.name for each in self.facts],
                [each.value for each in self.facts],
                *map(list, zip(*hooks, strict=True)),
            )
        dicts, names, values, *hooks = self._flat
        if not all(map(operator.is_, map(dict.get, dicts, names, itertools.repeat(_Absent)), values)):
            for fact, place in zip(self.facts, dicts, strict=True):
                if not same(place.get(fact.name, _Absent), fact.value):
                    yield f"{fact.path}: {fact.name} was set"
        if hooks and any(map(dict.get, *hooks)):
            yield from (f"{path}: a hook was registered" for path, module in self.run_through if any(vars(module)[kind] for kind in HOOKS))
        for path, module, children in self.containers:
            if _children(module) != children:
                yield f"{path}: its children were changed"
        for path, module, _, name, value, contents in self.changeable:  # another list of the same is no change: tracers put one there
            if not is_unchanged(now := vars(module).get(name, _Absent), contents):
                yield f"{path}: {name} was {'changed in place' if now is value else 'set'}"
        for (cls, name), (first, *more) in self.on_classes.items():
            value = _on_class(cls, name)
            if value is not first and not is_unchanged(value, (first, *more)):
                yield f"{name} of class {cls.__name__} was changed"

    def __getstate__(self) -> dict[str, Any]:
        """What classes hold belongs to no copy or pickle."""
        self.stands()
        return {**vars(self), "_flat": (), "on_classes": list(self.on_classes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, on_classes={})
        for cls, name in state["on_classes"]:
            self._note_class(cls, name)


def _on_class(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), _Absent)


@dataclass
class Reads:
    """Records which attributes Python reads of the modules of a model."""

    names: dict[str, set[str]] = field(default_factory=dict)
    is_on: bool = False

    def watch(self, model: nn.Module) -> nn.Module:
        """Let the modules of a copy report what is read of them; the copy is good for nothing else afterwards."""
        for path, module in model.named_modules():
            module.__class__ = _reporting(type(module), self._note(path))
        return model

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What fx itself reads is no read of the forward."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before

    def of(self, path: str) -> frozenset[str]:
        """What was read of a module and is its own; methods count, since they can be set on the instance too."""
        return frozenset(self.names.get(path, ())) - _OF_EVERY_MODULE

    def _note(self, path: str) -> Callable[[str], None]:
        def note(name: str) -> None:
            if self.is_on:
                self.names.setdefault(path, set()).add(name)

        return note


def _reporting(original: type[nn.Module], note: Callable[[str], None]) -> type[nn.Module]:
    def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
        if name != "__dict__" or sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] not in ("torch", "diffq_fx"):
            note(name)
        return original.__getattribute__(self, name)

    body = {"__getattribute__": __getattribute__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), body)
