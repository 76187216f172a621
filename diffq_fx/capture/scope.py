"""Module scope: the dynamic subclasses of modules that diffq_fx has taken over.

A module keeps its attributes, its children and its place in the model; its class becomes a subclass of the original one, so that
``isinstance``, ``state_dict`` keys, hooks, ``.config`` and ``.generate()`` survive. A pickle rebuilds the subclass from the original
class, so a file holds no generated code.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from diffq_fx.capture.handing import handed_weights, is_handed, run_forward_of_instance, runs_forward_of_instance, weight_properties
from diffq_fx.capture.trace import HANDED, OwnForwardTracer, trace_in_both_modes
from diffq_fx.capture.watch import GraphWatch, Reads, WatchedModule, is_frozen
from diffq_fx.errors import CaptureError
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX, owner_of

_INSTANCE_FORWARD = "forward_of_this_instance"


@dataclass(frozen=True)
class TakenOver:
    """What diffq_fx does for one module."""

    weights: tuple[str, ...] = ()
    """Weights that its forward makes, by name relative to it: those that it reads, its own and its children's."""
    owned: tuple[str, ...] = ()
    """Its own weights, which it reads through its class: some forward may have been handed others in their place."""
    traced: bool = False
    """Its forward is a graph, in which the weights are made; else they are made first and handed to the original forward."""


class ScopedModule:
    """Mixed into the class of a module that diffq_fx took over; never instantiated itself."""

    taken_over: TakenOver
    original_class: Any  # a subclass of nn.Module, whose own methods are called with self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScopedModule":
        """Copy the state; the copy is of the same class, since the captured forward is a function of its module."""
        if hasattr(self.original_class, "__deepcopy__"):
            return self.original_class.__deepcopy__(self, memo)
        copied = memo[id(self)] = type(self).__new__(type(self))
        self.original_class.__setstate__(copied, copy.deepcopy(_state_of(self), memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class and the plain state."""
        return _bare, (self.original_class, self.taken_over, isinstance(self, WatchedModule)), _state_of(self)

    def __setstate__(self, state: Any) -> None:
        """Unpickle as the original class would, then take the module over again."""
        self.original_class.__setstate__(self, state)
        if self.taken_over.traced:
            install_graph(self)  # type: ignore[arg-type]


def _state_of(module: Any) -> Any:
    """What copy and pickle take for the state of an object; Python 3.10 has no ``object.__getstate__``."""
    return module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__


def _bare(original: type[nn.Module], taken_over: TakenOver, is_watched: bool) -> nn.Module:
    """An uninitialized module of the subclass, for pickle to fill."""
    cls = _subclass(original, taken_over, is_watched)
    return cls.__new__(cls)


def _subclass(original: type[nn.Module], taken_over: TakenOver, is_watched: bool, graph: Any = None) -> type[nn.Module]:
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original_class": original,
        "taken_over": taken_over,
        **weight_properties(original, taken_over.owned),
    }
    body["forward"] = python_forward(original) if graph is None else graph
    bases = (ScopedModule, WatchedModule, original) if is_watched else (ScopedModule, original)
    return type(original.__name__, bases, body)


def python_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """The original forward, with the weights that it reads made first, or taken from the keyword ``HANDED``."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = kwargs.pop(HANDED, None)
        with handed_weights(self, _made_weights(self) if weights is None else weights):
            own = self.__dict__.get(_INSTANCE_FORWARD)
            if own is None or runs_forward_of_instance(self):
                return original.forward(self, *args, **kwargs)
            return run_forward_of_instance(self, own, args, kwargs)

    return forward


def _made_weights(module: Any) -> dict[str, Tensor]:
    """The weights for one forward, by name: from quantizers, or from stored integers. A layer put in the place of another has neither."""
    made = {}
    for name in module.taken_over.weights:
        owner, attribute = owner_of(module, name)
        if is_handed(owner, attribute):  # a forward around this one has made it
            continue
        if (stored := owner._modules.get(attribute + STORED_SUFFIX)) is not None:
            made[name] = stored()
        elif (quantizer := owner._modules.get(attribute + QUANTIZER_SUFFIX)) is not None:
            made[name] = quantizer(getattr(owner, attribute))
    return made


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before diffq_fx took it over."""
    return module.original_class if isinstance(module, ScopedModule) else type(module)


def take_over(module: nn.Module, taken_over: TakenOver, watch: GraphWatch | None = None) -> None:
    """Give a module its subclass; its forward is the original one until a graph is installed."""
    attributes, original = vars(module), original_class(module)
    if "forward" in attributes:
        attributes[_INSTANCE_FORWARD] = attributes.pop("forward")
    if taken_over.owned and issubclass(original, nn.RNNBase):
        attributes.pop("_flat_weights", None)
    if watch is not None:
        attributes["graph_watch"] = watch
    module.__class__ = _subclass(original, taken_over, watch is not None)


def takeovers(model: nn.Module, readers: Mapping[str, tuple[str, ...]], names: list[str]) -> dict[str, TakenOver]:
    """What to do for each module, by path: ``readers`` make weights (by relative name), the owners of ``names`` give theirs out."""
    found = {path: TakenOver(weights=weights) for path, weights in readers.items()}
    paths = {module: path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    for name in names:
        owner, attribute = owner_of(model, name)
        before = found.get(paths[owner], TakenOver())
        found[paths[owner]] = replace(before, owned=tuple(dict.fromkeys((*before.owned, attribute))))
    return found


def capture_own_forward(module: nn.Module) -> fx.GraphModule:
    """Trace a module's own forward, children as calls.

    Raises:
        CaptureError: the forward has optional arguments, reads an attribute that a graph would freeze, or cannot be traced faithfully.
    """
    if {"forward", _INSTANCE_FORWARD} & vars(module).keys():
        raise CaptureError("a forward of its own is set on the instance")
    parameters = inspect.signature(original_class(module).forward).parameters.values()
    for parameter in list(parameters)[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or parameter.default is not inspect.Parameter.empty:
            raise CaptureError(f"its forward has the optional argument {parameter.name!r}")

    def make_copy(training: bool) -> nn.Module:
        plain = _plain_copy(module)
        plain.training = training  # of this module alone: the children are the model's own
        return plain

    reads = Reads(is_on=True)
    graph, _ = trace_in_both_modes(lambda training: reads.watch_alone(make_copy(training)), OwnForwardTracer)
    is_torchs = original_class(module).__module__.partition(".")[0] == "torch"  # whose settings, such as a stride, belong to the operator
    for name in () if is_torchs else sorted(reads.of("")):
        if is_frozen(module, name):
            raise CaptureError(f"its forward reads {name}, which a graph would freeze")
    return fx.GraphModule(make_copy(module.training), graph)


def install_graph(module: nn.Module, gm: fx.GraphModule | None = None) -> None:
    """Make a rewritten graph the forward of a module; without one, a graph that reads the quantizers or stored weights which it has now."""
    code = (scope_graph(module) if gm is None else gm).graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<diffq_fx captured forward>", "exec"), scope)  # noqa: S102
    taken_over: TakenOver = module.taken_over  # type: ignore[assignment]
    module.__class__ = _subclass(original_class(module), taken_over, False, scope["forward"])


def scope_graph(module: Any) -> fx.GraphModule:
    """The graph of a module that was taken over, made again from its original forward and the children it has now.

    A weight with a quantizer child reads through it; a stored weight stands for the parameter that is gone.
    """
    gm = capture_own_forward(module)
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or node.target not in module.taken_over.weights:
            continue
        owner, attribute = owner_of(module, node.target)
        readers = list(node.users)
        is_stored = attribute + STORED_SUFFIX in owner._modules
        suffix = STORED_SUFFIX if is_stored else QUANTIZER_SUFFIX
        gm.add_submodule(node.target + suffix, owner.get_submodule(attribute + suffix))
        with gm.graph.inserting_after(node):
            made = gm.graph.call_module(node.target + suffix, () if is_stored else (node,))
        for reader in readers:
            reader.replace_input_with(node, made)
        if not node.users:
            gm.graph.erase_node(node)
    return gm


def _plain_copy(module: nn.Module) -> nn.Module:
    """The module as its original class, sharing all that it holds; good for tracing only.

    Where a weight is stored as integers an empty parameter stands for it.
    """
    plain = _shallow_copy(module)
    for name in module.taken_over.weights if isinstance(module, ScopedModule) else ():
        *path, attribute = name.split(".")
        owner = plain
        for part in path:
            owner._modules[part] = _shallow_copy(owner.get_submodule(part))
            owner = owner.get_submodule(part)
        stored = owner._modules.get(attribute + STORED_SUFFIX)
        if isinstance(stored, StoredWeight):
            owner._parameters[attribute] = nn.Parameter(torch.empty(stored.spec.shape, device="meta"))
    return plain


def _shallow_copy(module: nn.Module) -> nn.Module:
    copied = object.__new__(original_class(module))
    copied.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[registry] = dict(module.__dict__[registry])
    return copied
