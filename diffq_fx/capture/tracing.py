"""Trace a forward into a graph in which every weight to quantize is a get_attr node, or say why that is not faithful.

Used for a whole model (model scope) and for the small forward of one module (module scope).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import fx, nn

from diffq_fx.capture.calls import ExampleCall
from diffq_fx.capture.plan import WeightPlan
from diffq_fx.errors import CaptureError

SWAPPED = "swapped_weights"
"""Keyword under which a module that is called whole gets the tensors to use as its weights."""

CALLED_WHOLE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.EmbeddingBag, nn.TransformerEncoderLayer)
"""Modules of torch whose forward cannot be traced, or should not be."""


class WeightTracer(fx.Tracer):
    """Traces through every module that holds a weight to quantize; all others stay calls, so that train()/eval() keep working."""

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan
        self.called_whole: list[str] = []
        self._weight_nodes: dict[int, fx.Proxy] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module without a weight to quantize is a leaf, whatever its forward does."""
        return not any(self.plan.spec_of(parameter) for parameter in m.parameters())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an RNN or its like whole, with the weights it reads as inputs of its node."""
        if not isinstance(m, CALLED_WHOLE):
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        weights = {
            name: self._weight(f"{path}.{name}", parameter)
            for name, parameter in m.named_parameters()
            if self.plan.spec_of(parameter)
        }
        if not weights:
            return self.create_proxy("call_module", path, args, kwargs)
        self.called_whole.append(path)
        return self.create_proxy("call_module", path, args, {**kwargs, SWAPPED: weights})

    def _weight(self, target: str, parameter: nn.Parameter) -> fx.Proxy:
        key = id(parameter)
        if key not in self._weight_nodes:
            self._weight_nodes[key] = self.create_proxy("get_attr", target, (), {})
        return self._weight_nodes[key]


class OwnForwardTracer(fx.Tracer):
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


def trace_in_both_modes(
    make_copy: Callable[[bool], nn.Module], make_tracer: Callable[[], fx.Tracer]
) -> tuple[fx.Graph, fx.Tracer]:
    """Trace a module in train and in eval mode and return the graph if it is one and the same.

    Tracing runs on copies that share the parameters: a forward that fails half-way, or stores something on itself, leaves the module as
    it was.

    Args:
        make_copy: gives a copy of the module in train (True) or eval (False) mode.
        make_tracer: a new tracer per trace.

    Returns:
        The graph, and the tracer that made it.

    Raises:
        CaptureError: says why a graph would not be faithful.
    """
    traces = []
    for training in (True, False):
        private, tracer = make_copy(training), make_tracer()
        try:
            with _no_checkpointing():
                graph = tracer.trace(private)
        except CaptureError:
            raise
        except Exception as err:  # a traced forward is the user's code and may raise anything  # noqa: BLE001
            raise CaptureError(_first_line(err)) from err
        constants = [str(node.target) for node in graph.nodes if node.op == "get_attr" and "_tensor_constant" in str(node.target)]
        if constants:
            raise CaptureError("the forward makes a tensor that does not depend on its inputs, which a graph would freeze")
        traces.append((graph, tracer))
    train_code, eval_code = (graph.python_code("self").src for graph, _ in traces)
    if train_code != eval_code:
        raise CaptureError("the forward does something else in train() than in eval(), which one graph cannot")
    return traces[1]


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}".rstrip(": ")


@contextmanager
def _no_checkpointing() -> Iterator[None]:
    """Refuse activation checkpointing while tracing: fx would inline it away, and the saved memory with it."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CaptureError("the forward uses activation checkpointing, which a graph would lose")

    class Refuse:
        apply = staticmethod(refuse)

    module = torch.utils.checkpoint
    saved = {name: getattr(module, name) for name in ("_checkpoint_without_reentrant_generator", "CheckpointFunction")}
    module._checkpoint_without_reentrant_generator = refuse  # noqa: SLF001
    module.CheckpointFunction = Refuse
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(module, name, value)
