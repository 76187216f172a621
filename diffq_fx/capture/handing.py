"""Hand a forward other tensors in place of the weights that it reads, without writing to a module.

For forwards that run as they are (LSTM, MultiheadAttention, anything that cannot be traced). What is handed is known to the thread that
runs the forward; the classes of the modules that own weights read it there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffq_fx.weights import STORED_SUFFIX, owner_of


class _OfThisThread(threading.local):
    """What the forwards of this thread read in place of parameters, by the identity of the owner and the name there."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, str], Tensor] = {}
        self.own_forwards: frozenset[int] = frozenset()
        """Modules whose forward of the instance runs; it may call that of the class."""


_here = _OfThisThread()


@contextmanager
def handed_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the forwards of this thread read ``weights`` (by name relative to ``module``) in place of its parameters."""
    before = _here.weights
    places = {name: owner_of(module, name) for name in weights}
    _here.weights = before | {(id(owner), attribute): weights[name] for name, (owner, attribute) in places.items()}
    try:
        yield
    finally:
        _here.weights = before


def is_handed(owner: nn.Module, attribute: str) -> bool:
    """Whether a forward of this thread reads another tensor in place of this weight."""
    return (id(owner), attribute) in _here.weights


def run_forward_of_instance(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a forward that is set on an instance; if it calls that of its class, the original one runs."""
    before = _here.own_forwards
    _here.own_forwards = before | {id(module)}
    try:
        return forward(*args, **kwargs)
    finally:
        _here.own_forwards = before


def runs_forward_of_instance(module: nn.Module) -> bool:
    """Whether such a forward is running."""
    return id(module) in _here.own_forwards


def weight_properties(original: type[nn.Module], owned: tuple[str, ...]) -> dict[str, property]:
    """Attributes of a class that read the weights which its instances own, or what is handed in their place."""
    properties = {name: _weight_property(name) for name in owned}
    if owned and issubclass(original, nn.RNNBase):  # an RNN reads its weights from a list of its own
        properties["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
    return properties


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
