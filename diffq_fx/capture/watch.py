"""What a graph of a whole model depends on beside tensors: the attributes that Python read while it was traced, and hooks.

The graph does not read them again. A change of one, or a hook on a module that the graph does not call, ends the use of the graph:
from then on the model runs its original forward, in which every module makes its own weights. Most changes are met where they are made;
what changes in place is compared at each forward.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.capture.contents import can_change_in_place, contents_of, is_unchanged

HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
    "add_module",
)
"""Methods of a module that change what it does or runs."""

_ABSENT = object()
_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), *dir(nn.Module), "graph_watch"}) - {"_modules", "forward"}


@dataclass
class GraphUse:
    """Whether a model's graph still stands for its forward; one for all modules of the model."""

    ended_by: str = ""
    """What was changed; empty while the graph is used."""
    changeable: list[tuple[str, Any, tuple[Any, ...]]] = field(default_factory=list)
    """What was read and can change in place: name, object, and what it held."""
    on_classes: dict[tuple[type, str], tuple[Any, ...]] = field(default_factory=dict)
    """What was read and belongs to a class, methods included; an object that can change in place by what it held."""

    def note(self, name: str, value: Any) -> None:
        """Watch an object that was read, if it can change in place.

        Raises:
            CaptureError: its changes could not be seen.
        """
        if can_change_in_place(value):
            self.changeable.append((name, value, contents_of(value, name)))

    def note_class(self, cls: type, name: str) -> None:
        """Watch what a class has under a name.

        Raises:
            CaptureError: its changes could not be seen.
        """
        value = _on_class(cls, name)
        is_plain = hasattr(type(value), "__get__") or not can_change_in_place(value)
        self.on_classes[cls, name] = (value,) if is_plain else contents_of(value, name)

    def stands(self) -> bool:
        """Whether nothing was changed that the graph depends on. A compiled model is what it was when it was compiled."""
        if not self.ended_by and not torch.compiler.is_dynamo_compiling():
            self.ended_by = next(self._changes(), "")
        return not self.ended_by

    def _changes(self) -> Iterator[str]:
        for name, value, contents in self.changeable:
            if not is_unchanged(value, contents):
                yield f"{name} was changed in place"
        for (cls, name), (first, *more) in self.on_classes.items():
            value = _on_class(cls, name)
            if value is not first and not is_unchanged(value, (first, *more)):
                yield f"{name} of class {cls.__name__} was changed"

    def __getstate__(self) -> dict[str, Any]:
        """What classes hold belongs to no copy or pickle."""
        self.stands()
        return {**vars(self), "on_classes": list(self.on_classes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, on_classes={})
        for cls, name in state["on_classes"]:
            self.note_class(cls, name)


def _on_class(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), _ABSENT)


@dataclass
class GraphWatch:
    """What to watch on one module."""

    use: GraphUse
    path: str
    names: frozenset[str]
    """Attributes that were read while tracing."""

    def end(self, change: str) -> None:
        """The model runs its original forward from now on."""
        self.use.ended_by = self.use.ended_by or f"{self.path or 'the model'}: {change}"


def is_frozen(module: nn.Module, name: str) -> bool:
    """Whether a graph holds what an attribute was when it was traced; it reads tensors and modules where they are, lists of them too."""
    if name in vars(module):
        held = _compat.tree_leaves(vars(module)[name])
        return not held or not all(isinstance(each, Tensor | nn.Module) for each in held)
    on_class = _on_class(type(module), name)
    return on_class is not _ABSENT and not hasattr(type(on_class), "__get__")


def note_change(module: Any, name: str, value: Any) -> None:
    """End the use of the graph if an attribute is to get another value that the traced forward has read."""
    watch: GraphWatch | None = module.__dict__.get("graph_watch")
    if watch is None or (name not in watch.names and not isinstance(value, nn.Module)):
        return
    before = module._modules.get(name, module.__dict__.get(name, _ABSENT))
    follows = name in module._parameters or name in module._buffers  # the graph reads tensors where they are
    if before is value or (follows and (value is None or isinstance(value, Tensor))):
        return
    if not (type(before) is type(value) and isinstance(value, int | float | str) and before == value):
        watch.end(f"{name} was set")


def note_call(module: Any, method: str) -> None:
    """End the use of the graph if a method is called that changes what its module does."""
    watch: GraphWatch | None = module.__dict__.get("graph_watch")
    if watch is not None and (method != "add_module" or "_modules" in watch.names):
        watch.end(f"{method} was called")


class WatchedAttributes:
    """Mixed into the class of a module that a graph of the whole model runs through: what Python changes on it, the graph cannot see."""

    def __setattr__(self, name: str, value: Any) -> None:
        note_change(self, name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        note_change(self, name, None)
        super().__delattr__(name)


class WatchedModule(WatchedAttributes):
    """The same for a module that the graph does not call: no hook on it would fire."""


def _watched(method: str) -> Callable[..., Any]:
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        note_call(self, method)
        return getattr(super(WatchedModule, self), method)(*args, **kwargs)

    return functools.wraps(getattr(nn.Module, method))(change)


for _method in HOOKS:
    setattr(WatchedModule, _method, _watched(_method))


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

    def watch_alone(self, module: nn.Module) -> nn.Module:
        """The same for one module, whose children belong to a model in use."""
        module.__class__ = _reporting(type(module), self._note(""))
        return module

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
        note(name)
        return original.__getattribute__(self, name)

    body = {"__getattribute__": __getattribute__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), body)
