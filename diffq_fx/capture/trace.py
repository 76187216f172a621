"""Trace a forward into a graph in which every weight to quantize is a get_attr node, or say why that is not faithful.

Used for a whole model (model scope) and for the small forward of one module (module scope).
"""

import inspect
import keyword
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch.utils.checkpoint
from torch import fx, nn

from diffq_fx.capture.copies import restored_state
from diffq_fx.capture.watch import Reads
from diffq_fx.errors import CaptureError
from diffq_fx.example import Example, random_fingerprint, restored_random_state
from diffq_fx.selection import Selection
from diffq_fx.weights import owner_of

HANDED = "handed_weights"
"""Keyword under which a module that is called whole gets the tensors to use as its weights."""

CALLED_WHOLE = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.EmbeddingBag,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.Transformer,
)
"""Modules of torch whose forward cannot be traced, or should not be."""


class _StrictProxy(fx.Proxy):
    """Refuses what a graph would lose without a word: ``x.requires_grad = True`` is no operation."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise CaptureError(f"the forward sets the attribute {name!r} of a tensor, which a graph would lose")
        super().__setattr__(name, value)


class _StrictTracer(fx.Tracer):
    """Traces with proxies that refuse what a graph cannot hold, also for buffers: what Python decides on their values would be frozen."""

    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace as fx does."""
        self._grad_state = _grad_state()
        return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a node."""
        return _StrictProxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node, if it can do what the forward does here."""
        if _grad_state() != self._grad_state:
            raise CaptureError("the forward switches gradients on or off (torch.no_grad), which a graph would lose")
        if kind in ("get_attr", "call_module") and any(keyword.iskeyword(part) for part in str(target).split(".")):
            raise CaptureError(f"the name {str(target)!r} holds a keyword of Python, which a graph cannot write")
        return super().create_node(kind, target, *args, **kwargs)


def _grad_state() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class WeightTracer(_StrictTracer):
    """Traces through every module that holds a weight to quantize; all others stay calls, so that train()/eval() keep working."""

    def __init__(self, selection: Selection, reads: Reads) -> None:
        super().__init__()
        self.selection, self.reads = selection, reads
        self.called_whole: set[str] = set()
        self.run_through: set[str] = {""}
        self.readers: dict[int, set[str]] = {}
        """Paths of the modules whose forwards read a weight, by the weight's identity."""
        self._reading: str | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace, and record what the forward reads meanwhile."""
        try:
            return super().trace(root, concrete_args)
        finally:
            self.reads.is_on = False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Make the placeholders; the forward begins after that."""
        self._holders = {m for m in self.root.modules() if any(self.selection.spec_of(p) for p in m.parameters())}
        made = super().create_args_for_root(root_fn, is_module, concrete_args)
        self.reads.is_on = True
        return made

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module without a weight to quantize is a leaf, whatever its forward does."""
        return m not in self._holders

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read an attribute as fx does, and note who reads a weight."""
        if self.selection.spec_of(attr_val):
            self.readers.setdefault(id(attr_val), set()).add(self.scope.module_path if self._reading is None else self._reading)
        with self.reads.paused():
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Make an argument of a node, as fx does."""
        with self.reads.paused():
            return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an RNN or its like whole, with the weights it reads as inputs of its node."""
        path = self.path_of_module(m)
        if m in self._holders and "forward" in vars(m):
            raise CaptureError(f"{path} has a forward of its own on the instance, which a graph would lose")
        if not isinstance(m, CALLED_WHOLE) or m not in self._holders:
            self.run_through |= {path} if m in self._holders else set()
            return super().call_module(m, forward, args, kwargs)
        self.called_whole.add(path)
        self._reading = path
        with self.reads.paused():  # while tracing, to read a parameter is to make its node
            names = [name for name, parameter in m.named_parameters() if self.selection.spec_of(parameter)]
            weights = {name: getattr(*owner_of(m, name)) for name in names}
        self._reading = None
        return self.create_proxy("call_module", path, args, {**kwargs, HANDED: weights})


class OwnForwardTracer(_StrictTracer):
    """Traces one module's own forward; its children stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf."""
        return True


def omitted_arguments(module: nn.Module, example: Example) -> list[str]:
    """Arguments of the forward that a call leaves to their defaults, ``*args`` and ``**kwargs`` included."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*example.args, **example.kwargs)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        marks.get(parameter.kind, "") + name
        for name, parameter in signature.parameters.items()
        if parameter.kind in variable or name not in bound.arguments
    ]


TracerT = TypeVar("TracerT", bound=fx.Tracer)


def trace_in_both_modes(make_copy: Callable[[bool], nn.Module], make_tracer: Callable[[], TracerT]) -> tuple[fx.Graph, TracerT]:
    """Trace a module in train and in eval mode and return the graph if it is one and the same.

    Tracing runs on copies that share the parameters, and puts back what a forward stores on them.

    Args:
        make_copy: gives a copy of the module in train (True) or eval (False) mode.
        make_tracer: a new tracer per trace.

    Returns:
        The graph, and the tracer that made it.

    Raises:
        CaptureError: says why a graph would not be faithful.
    """
    graphs, tracers = [], []
    for training in (True, False):
        tracers.append(make_tracer())
        graphs.append(_traced(make_copy(training), tracers[-1]))
    train_code, eval_code = (graph.python_code("self").src for graph in graphs)
    if train_code != eval_code:
        raise CaptureError("the forward does something else in train() than in eval(), which one graph cannot")
    return graphs[1], tracers[1]


def _traced(module: nn.Module, tracer: fx.Tracer) -> fx.Graph:
    """One trace, and the proof that the forward did nothing beside what the graph holds."""
    with restored_state(module) as state, restored_random_state(), _refused_while_tracing():
        before = random_fingerprint()
        try:
            if "forward" in vars(module):
                raise CaptureError("a forward of its own is set on the instance, which a graph would lose")
            graph = tracer.trace(module)
        except CaptureError:
            raise
        except Exception as err:  # a traced forward is the user's code and may raise anything
            raise CaptureError(_first_line(err)) from err
        if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes):
            raise CaptureError("the forward makes a tensor that does not depend on its inputs, which a graph would freeze")
        if random_fingerprint() != before:
            raise CaptureError("the forward draws random numbers that do not depend on its inputs, which a graph would freeze")
        if changes := state.changes():
            raise CaptureError(f"the forward changes {', '.join(changes)} of the module, which a graph would do once and never again")
    return graph


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}".rstrip(": ")


@contextmanager
def _refused_while_tracing() -> Iterator[None]:
    """Refuse what fx would inline or lose without a word, where the forward calls it."""

    def refusing(what: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise CaptureError(f"the forward uses {what}, which a graph would lose")

        return refuse

    apply = vars(torch.autograd.Function)["apply"]

    def apply_or_refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, fx.Proxy) for arg in args):
            raise CaptureError(f"the forward uses the autograd.Function {cls.__name__}, whose backward a graph would lose")
        return apply.__get__(None, cls)(*args, **kwargs)

    refused = refusing("activation checkpointing or other hooks on saved tensors")
    with (
        torch.enable_grad(),
        mock.patch.object(torch.autograd.graph.saved_tensors_hooks, "__enter__", refused),
        mock.patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", refused),
        mock.patch.object(torch.amp.autocast_mode.autocast, "__enter__", refusing("a region of autocast")),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(apply_or_refuse)),
    ):
        yield
