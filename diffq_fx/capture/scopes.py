"""Modules that are called whole, and modules whose small forward is a captured graph: the dynamic subclasses behind both.

A module keeps its attributes, its children and its place in the model; its class becomes a subclass of the original one, so that
``isinstance``, ``state_dict`` keys, ``.config`` and ``.generate()`` survive. A pickle rebuilds the subclass from the original class,
so a file holds no generated code.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from diffq_fx.capture.swapping import owner_of, swapped_weights
from diffq_fx.capture.tracing import SWAPPED, OwnForwardTracer, trace_in_both_modes
from diffq_fx.errors import CaptureError
from diffq_fx.passes._graph import QUANTIZER_SUFFIX, STORED_SUFFIX
from diffq_fx.storage import StoredWeight

Kind = Literal["own forward", "weights", "called whole", "owner"]
"""own forward: the module's forward is a graph. weights: a graph makes the weights, then the original forward runs with them
swapped in. called whole: the weights come in as an argument. owner: only answers for weights that it has given up."""


class ScopedModule:
    """Mixed into the class of a module that diffq_fx took over; never instantiated itself."""

    scope_kind: Kind
    scope_weights: tuple[str, ...]
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
        return _bare, (self.original_class, self.scope_kind, self.scope_weights), _state_of(self)

    def __setstate__(self, state: Any) -> None:
        """Unpickle as the original class would, then take the module over again."""
        self.original_class.__setstate__(self, state)
        if self.scope_kind in ("own forward", "weights"):
            install_graph(self, self.scope_kind, scope_graph(self))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Answer for a weight that convert has replaced by integers: whoever reads it gets the float weight."""
        try:
            return self.original_class.__getattr__(self, name)
        except AttributeError:
            stored = self.__dict__.get("_modules", {}).get(name + STORED_SUFFIX)
            if isinstance(stored, StoredWeight):
                return stored()
            raise


def _state_of(module: Any) -> Any:
    """What copy and pickle take for the state of an object; Python 3.10 has no ``object.__getstate__``."""
    return module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__


def _bare(original: type[nn.Module], kind: Kind, weights: tuple[str, ...]) -> nn.Module:
    """An uninitialized module of the subclass, for pickle to fill."""
    cls = _subclass(original, kind, weights, _forward_with_weights if kind == "called whole" else None)
    return cls.__new__(cls)


def _subclass(original: type[nn.Module], kind: Kind, weights: tuple[str, ...], forward: Callable[..., Any] | None) -> type[nn.Module]:
    body: dict[str, Any] = {
        "scope_kind": kind,
        "scope_weights": weights,
        "original_class": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    if forward is not None:
        body["forward"] = forward
    return type(original.__name__, (ScopedModule, original), body)


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before diffq_fx took it over."""
    return module.original_class if isinstance(module, ScopedModule) else type(module)


def _forward_with_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
    weights: dict[str, Tensor] = kwargs.pop(SWAPPED, {})
    with swapped_weights(self, weights):
        return self.original_class.forward(self, *args, **kwargs)


def call_whole(module: nn.Module) -> None:
    """Let a module take the keyword ``swapped_weights``: the tensors that its forward is to use as its weights."""
    if not isinstance(module, ScopedModule):
        _become(module, _subclass(type(module), "called whole", (), _forward_with_weights))


def answer_for_stored_weights(module: nn.Module) -> None:
    """Let a module that owns stored weights give their float values to whoever reads ``module.weight``."""
    if not isinstance(module, ScopedModule):
        _become(module, _subclass(type(module), "owner", (), None))


def capture_own_forward(module: nn.Module) -> fx.GraphModule:
    """Trace a module's own forward, children as calls.

    Raises:
        CaptureError: the forward has optional arguments or cannot be traced faithfully.
    """
    parameters = inspect.signature(original_class(module).forward).parameters.values()
    for parameter in list(parameters)[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or parameter.default is not inspect.Parameter.empty:
            raise CaptureError(f"its forward has the optional argument {parameter.name!r}")

    def make_copy(training: bool) -> nn.Module:
        plain = _plain_copy(module)
        plain.training = training  # of this module alone: the children are the model's own
        return plain

    graph, _ = trace_in_both_modes(make_copy, OwnForwardTracer)
    return fx.GraphModule(make_copy(module.training), graph)


def capture_weights(module: nn.Module, names: tuple[str, ...]) -> fx.GraphModule:
    """A graph that reads weights and returns them by name: what a module that cannot be traced is rewritten through."""
    graph = fx.Graph()
    graph.output({name: graph.get_attr(name) for name in names})
    return fx.GraphModule(_plain_copy(module), graph)


def install_graph(module: nn.Module, kind: Kind, gm: fx.GraphModule, weights: tuple[str, ...] | None = None) -> None:
    """Make a rewritten graph the forward of its module."""
    original = original_class(module)
    if weights is None:
        weights = module.scope_weights if isinstance(module, ScopedModule) else ()
    function = _compiled(gm.graph)
    if kind == "own forward":
        forward = function
    else:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with swapped_weights(self, function(self)):
                return original.forward(self, *args, **kwargs)

    _become(module, _subclass(original, kind, weights, forward))


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The Python function of a graph, ``self`` its first argument."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<diffq_fx captured forward>", "exec"), scope)  # noqa: S102
    return scope["forward"]


def scope_graph(module: Any) -> fx.GraphModule:
    """The graph of a module that was taken over, made again from its original forward and the children it has now.

    A weight with a quantizer child reads through it; a stored weight stands for the parameter that is gone.
    """
    names = module.scope_weights
    gm = capture_own_forward(module) if module.scope_kind == "own forward" else capture_weights(module, names)
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or node.target not in names:
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
    for name in module.scope_weights if isinstance(module, ScopedModule) else ():
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
