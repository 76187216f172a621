"""Trace a forward into a graph in which every weight to quantize is a get_attr node, or say why that is not faithful.

Used for a whole model (model scope) and for the small forward of one module (module scope).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch.utils.checkpoint
from torch import fx, nn

from diffq_fx.capture.calls import ExampleCall, random_fingerprint, restored_random_state, restored_state
from diffq_fx.capture.plan import WeightPlan
from diffq_fx.capture.swapping import owner_of
from diffq_fx.errors import CaptureError

SWAPPED = "swapped_weights"
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

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a node."""
        return _StrictProxy(node, self)


class WeightTracer(_StrictTracer):
    """Traces through every module that holds a weight to quantize; all others stay calls, so that train()/eval() keep working."""

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan
        self.called_whole: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module without a weight to quantize is a leaf, whatever its forward does."""
        return not any(self.plan.spec_of(parameter) for parameter in m.parameters())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an RNN or its like whole, with the weights it reads as inputs of its node."""
        if not isinstance(m, CALLED_WHOLE):
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        names = [name for name, parameter in m.named_parameters() if self.plan.spec_of(parameter)]
        weights = {name: getattr(*owner_of(m, name)) for name in names}  # while tracing, to read a parameter is to make its node
        if not weights:
            return self.create_proxy("call_module", path, args, kwargs)
        self.called_whole.append(path)
        return self.create_proxy("call_module", path, args, {**kwargs, SWAPPED: weights})


class OwnForwardTracer(_StrictTracer):
    """Traces one module's own forward; its children stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf."""
        return True


def omitted_arguments(module: nn.Module, call: ExampleCall) -> list[str]:
    """Arguments of the forward that a call leaves to their defaults, ``*args`` and ``**kwargs`` included."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*call.args, **call.kwargs)
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
    with restored_state(module) as state, restored_random_state(), _no_saved_tensor_hooks():
        before = random_fingerprint()
        try:
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
def _no_saved_tensor_hooks() -> Iterator[None]:
    """Refuse activation checkpointing and other hooks on saved tensors: a graph has none, so the memory they save would be lost."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CaptureError("the forward uses activation checkpointing or other hooks on saved tensors, which a graph would lose")

    hooks, reentrant = torch.autograd.graph.saved_tensors_hooks, torch.utils.checkpoint.CheckpointFunction
    with torch.enable_grad(), mock.patch.object(hooks, "__enter__", refuse), mock.patch.object(reentrant, "apply", refuse):
        yield
