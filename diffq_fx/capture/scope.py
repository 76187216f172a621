"""Module scope: a module that reads weights runs its own Python, which finds the quantized weights in place of its own.

A module keeps its attributes, its children and its place in the model; its class becomes a subclass of the original one, so that
``isinstance``, ``state_dict`` keys, hooks, ``.config`` and ``.generate()`` survive. Its forward makes the weights that it reads and hands
them to the original forward: what is handed is known to the thread that runs it, and the classes of the modules that own the weights
read it there. No forward writes to a module.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.errors import PreparationError
from diffq_fx.parts import CHILD
from diffq_fx.sharded import is_sharded
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX, names_of, owner_of

HANDED = "handed_weights"
"""Keyword under which a module that a graph calls whole gets the tensors to use as its weights, by name."""

_INSTANCE_FORWARD = "forward_of_this_instance"


@dataclass(frozen=True)
class TakenOver:
    """What diffq_fx does for one module."""

    weights: tuple[str, ...] = ()
    """Weights that its forward makes, by name relative to it: those that it reads, its own and its children's."""
    owned: tuple[str, ...] = ()
    """Its own weights, which it reads through its class: some forward may have been handed others in their place."""


class _OfThisThread(threading.local):
    """What the forwards of this thread read in place of parameters, by the identity of the owner and the name there."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, str], Tensor] = {}
        self.own_forwards: frozenset[int] = frozenset()
        """Modules whose forward of the instance runs; it may call that of the class."""


_here = _OfThisThread()


class ScopedModule:
    """Mixed into the class of a module that diffq_fx took over; never instantiated itself."""

    taken_over: TakenOver
    original_class: Any  # a subclass of nn.Module, whose own methods are called with self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse another kind of tensor as a weight that is quantized here, such as that of another library's quantizer."""
        if name in self.taken_over.owned and param is not None:
            if _is_converted(self, name) or not (type(param) is nn.Parameter or is_sharded(param)):
                raise not_for_others(self, name, type(param).__name__)
        super().register_parameter(name, param)  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the original class and the plain state; Python 3.10 has no ``object.__getstate__``."""
        refuse_new_class(type(self), type(self))
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _bare, (self.original_class, self.taken_over), state


def _is_converted(module: ScopedModule, name: str) -> bool:
    return name + STORED_SUFFIX in module.__dict__["_modules"]


def not_for_others(module: ScopedModule, name: str, kind: str) -> PreparationError:
    """What to raise where another library would put its own ``kind`` of tensor or layer in the place of one that is quantized here."""
    state = "converted" if _is_converted(module, name) else "prepared"
    return PreparationError(
        f"{module.original_class.__name__}: its {name} is {state} by diffq_fx and cannot become a {kind}.\n"
        "  Give another quantizer the float model; for torchao's tensors call diffq_fx.integrations.torchao.to_torchao(convert(model))."
    )


def refuse_new_class(found: type, made: type) -> None:
    """Refuse to copy a module whose class was set since prepare made its own: the copy would be of the one that prepare made.

    Raises:
        PreparationError: ``made`` is not a class that prepare makes.
    """
    if "original_class" not in vars(made):
        raise PreparationError(
            f"the class {found.__name__} was set after prepare, and a copy would not have it.\n"
            "  Set it on the float model before prepare, or on the converted model."
        )


def _bare(original: type[nn.Module], taken_over: TakenOver) -> nn.Module:
    """An uninitialized module of the subclass, for copy and pickle to fill."""
    cls = _subclass(original, taken_over)
    return cls.__new__(cls)


def _subclass(original: type[nn.Module], taken_over: TakenOver) -> type[nn.Module]:
    body = class_body(original, taken_over) | {"forward": python_forward(original)}
    return type(original.__name__, (ScopedModule, original), body)


def class_body(original: type[nn.Module], taken_over: TakenOver) -> dict[str, Any]:
    """What a subclass says of its origin, and the attributes by which its instances read the weights that they own."""
    body: dict[str, Any] = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"original_class": original, "taken_over": taken_over}
    body |= {name: _weight_property(name) for name in taken_over.owned}
    if taken_over.owned and issubclass(original, nn.RNNBase):  # an RNN reads its weights from a list of its own
        body["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
    return body


def _weight_property(attribute: str) -> property:
    def read(self: Any) -> Any:
        handed = _here.weights.get((id(self), attribute))
        if handed is not None:
            return handed
        if attribute in self._parameters:
            return nn.Module.__getattr__(self, attribute)  # fx traces what is read by this function
        if attribute in self.__dict__:  # a replica of DataParallel has tensors
            return self.__dict__[attribute]
        stored = self._modules.get(attribute + STORED_SUFFIX)
        if stored is None:
            raise AttributeError(attribute)
        return stored()

    def write(self: Any, value: Any) -> None:
        self.__dict__[attribute] = value

    def delete(self: Any) -> None:
        self.__dict__.pop(attribute)

    return property(read, write, delete)


def python_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """The original forward, with the weights that it reads made first, or taken from the keyword ``HANDED``."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_ties(self)
        weights, own_forwards = _here.weights, _here.own_forwards
        handed = kwargs.pop(HANDED, None)
        made = _made_weights(self) if handed is None else {_place_of(self, name): each for name, each in handed.items()}
        own = None if id(self) in own_forwards else self.__dict__.get(_INSTANCE_FORWARD)
        _here.weights = weights | made
        try:
            if own is None:
                return original.forward(self, *args, **kwargs)
            _here.own_forwards = own_forwards | {id(self)}
            return own(*args, **kwargs)
        finally:
            _here.weights, _here.own_forwards = weights, own_forwards

    return forward


def _place_of(module: nn.Module, name: str) -> tuple[int, str]:
    owner, attribute = owner_of(module, name)
    return id(owner), attribute


def _made_weights(module: Any) -> dict[tuple[int, str], Tensor]:
    """The weights for one forward: from quantizers, or from stored integers. A layer put in the place of another has neither."""
    made = {}
    for name in module.taken_over.weights:
        owner, attribute = owner_of(module, name)
        place = id(owner), attribute
        if place in _here.weights:  # a forward around this one has made it
            continue
        if (stored := owner._modules.get(attribute + STORED_SUFFIX)) is not None:
            made[place] = stored()
        elif (quantizer := getattr(owner, attribute + QUANTIZER_SUFFIX, None)) is not None:
            made[place] = quantizer(getattr(owner, attribute))
    return made


def refuse_ties(model: nn.Module) -> None:
    """Refuse to train a prepared model in which weights were tied since: one Parameter would have two sets of bits.

    Raises:
        PreparationError: names both.
    """
    if CHILD in model.__dict__ and model.training and not torch.compiler.is_compiling() and (tied := tied_since(model)):
        raise PreparationError(f"{tied}.\n  Tie the weights of the float model, and prepare it then.")


def tied_since(model: nn.Module) -> str:
    """Which weights of a prepared model have become one Parameter since it was prepared, in words; empty if none have."""
    compression, seen = model.__dict__[CHILD], set()
    quantizers = getattr(compression, "quantizers", ())  # a converted model has none
    for registry, name in (*(quantizer.place for quantizer in quantizers), *(compression.rest if quantizers else ())):
        tensor = registry.get(name)
        if id(tensor) in seen:
            names = " and ".join(map(repr, names_of(model, tensor)))
            return f"weights {names} are one Parameter now, and were not when the model was prepared"
        if isinstance(tensor, nn.Parameter):
            seen.add(id(tensor))
    return ""


def take_over(module: nn.Module, taken_over: TakenOver) -> None:
    """Give a module its subclass."""
    attributes, original = vars(module), type(module)
    if "forward" in attributes:
        attributes[_INSTANCE_FORWARD] = attributes.pop("forward")
    if taken_over.owned and issubclass(original, nn.RNNBase):
        attributes.pop("_flat_weights", None)
    module.__class__ = _subclass(original, taken_over)


def takeovers(model: nn.Module, readers: Mapping[str, tuple[str, ...]], names: list[str]) -> dict[str, TakenOver]:
    """What to do for each module, by path: ``readers`` make weights (by relative name), the owners of ``names`` give theirs out."""
    found = {path: TakenOver(weights=weights) for path, weights in readers.items()}
    paths = {module: path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    for name in names:
        owner, attribute = owner_of(model, name)
        before = found.get(paths[owner], TakenOver())
        found[paths[owner]] = replace(before, owned=tuple(dict.fromkeys((*before.owned, attribute))))
    return found
