"""What an object that can change in place holds, noted so that a later look shows whether it still does."""

import contextlib
import enum
import functools
import itertools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.errors import CaptureError

MOST_VALUES = 1000
"""More are not compared at each forward."""

_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, frozenset, enum.Enum, type, types.ModuleType, types.BuiltinFunctionType),
    *(Tensor, nn.Module, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_COMPARED_BY_VALUE = (bool, int, float, complex, str, bytes, range, frozenset, torch.device, torch.Size)
_CONTAINERS = (dict, list, tuple, set, deque)
_END = object()


def can_change_in_place(value: Any) -> bool:
    """Whether a value is neither a number or its like, nor a tensor or module, which a graph reads where they are."""
    return not isinstance(value, _ATOMS)


def contents_of(value: Any, what: str) -> tuple[Any, ...]:
    """Everything that a value holds, at any depth, in an order of its own.

    Raises:
        CaptureError: ``what`` holds an object whose state Python does not show, or more than ``MOST_VALUES`` values.
    """
    found = tuple(itertools.islice(_walk(value, set()), MOST_VALUES + 1))
    if len(found) > MOST_VALUES:
        raise CaptureError(f"the forward reads {what}, which holds more than {MOST_VALUES} values, whose changes a graph would not see")
    for each in found:
        if not isinstance(each, _ATOMS):
            raise CaptureError(f"the forward reads {what}, which holds a {type(each).__name__}, whose changes a graph would not see")
    return found


def is_unchanged(value: Any, contents: tuple[Any, ...]) -> bool:
    """Whether a value holds what it held."""
    now = _walk(value, set())
    return all(same(next(now, _END), each) for each in contents) and next(now, _END) is _END


def same(a: Any, b: Any) -> bool:
    """Whether two values are one object, or equal and of a type whose objects do not change."""
    return a is b or (type(a) is type(b) and isinstance(a, _COMPARED_BY_VALUE) and bool(a == b))


def _walk(value: Any, seen: set[int]) -> Iterator[Any]:
    """The value and its parts; each object that has parts once, since objects may hold each other."""
    if isinstance(value, _ATOMS) or (parts := pieces_of(value)) is None:
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    yield type(value)
    yield len(parts)
    keys_count = not isinstance(value, list | tuple | deque)
    for part in itertools.chain.from_iterable(parts.items()) if keys_count else parts.values():
        yield from _walk(part, seen)


def pieces_of(value: Any) -> dict[Any, Any] | None:
    """What an object of any type is made of, by key, no object made for it; None for what cannot be looked into."""
    if isinstance(value, types.FunctionType):
        defaults = {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__}
        return {"code": value.__code__.co_code, **defaults, **dict(enumerate(_enclosed(value)))}
    if isinstance(value, types.MethodType):
        return {"function": value.__func__, "self": value.__self__}
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    attributes = {} if type(value) in _CONTAINERS else _attributes(value)
    if isinstance(value, set):
        return {0: frozenset(value), **attributes} if all(isinstance(each, (*_ATOMS, tuple)) for each in value) else None
    if isinstance(value, Mapping | list | tuple | deque):
        parts = value if isinstance(value, Mapping) else dict(enumerate(value))
        return {**parts, **{f".{name}": part for name, part in attributes.items()}}
    return attributes if hasattr(value, "__dict__") or attributes else None


def _enclosed(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            yield cell.cell_contents


def _attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, and the plain ones of its class."""
    own = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        for name, kept in vars(cls).items():
            if isinstance(kept, types.MemberDescriptorType) and "__slots__" in vars(cls):
                own.setdefault(name, getattr(value, name, None))
            elif isinstance(kept, (*_COMPARED_BY_VALUE, *_CONTAINERS)) and not name.startswith("__"):
                own.setdefault(name, kept)
    return own
