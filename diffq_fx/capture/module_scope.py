"""Module scope: the model stays ordinary Python; only the modules that read a weight to quantize are rewritten."""

from dataclasses import dataclass

from torch import fx, nn

from diffq_fx.capture.calls import ExampleCall, copy_sharing_parameters
from diffq_fx.capture.consumers import find_consumers
from diffq_fx.capture.plan import WeightPlan
from diffq_fx.capture.scopes import Kind, capture_own_forward, capture_weights
from diffq_fx.capture.swapping import owner_of
from diffq_fx.errors import CaptureError


@dataclass
class ModuleScope:
    """One module that reads weights, and the graph it reads them through."""

    path: str
    module: nn.Module
    kind: Kind
    graph: fx.GraphModule
    reason: str = ""
    """Why its own forward could not be traced."""


def capture_modules(
    model: nn.Module, call: ExampleCall, plan: WeightPlan, *, trace_forwards: bool
) -> tuple[nn.Module, list[ModuleScope], list[str]]:
    """Find the modules that read weights and capture each of them.

    Args:
        model: the float model; not changed.
        call: the example that is run to see who reads what.
        plan: the weights of interest.
        trace_forwards: trace the forwards of the consumers where that is faithful; else only make their weights by a graph.

    Returns:
        A copy of the model that shares its Parameters, its scopes (not installed yet), and the weights that the example never read.
    """
    consumers, unseen = find_consumers(copy_sharing_parameters(model), call, plan)
    private = copy_sharing_parameters(model)
    scopes = []
    for path, names in consumers.items():
        module = private.get_submodule(path)
        kind, graph, reason = "weights", None, "tracing was not faithful"
        if trace_forwards:
            try:
                graph = capture_own_forward(module)
                _check_reads(graph, module, names)
                kind = "own forward"
            except CaptureError as err:
                graph, reason = None, str(err)
        if graph is None:
            graph = capture_weights(module, tuple(names))
        scopes.append(ModuleScope(path, module, kind, graph, "" if kind == "own forward" else reason))
    return private, scopes, unseen


def _check_reads(graph: fx.GraphModule, module: nn.Module, names: list[str]) -> None:
    """Refuse a graph that does not read all the weights that the module was seen to read."""
    read = {id(owner._parameters.get(attribute)) for owner, attribute in _get_attrs(graph, module)}
    for name in names:
        owner, attribute = owner_of(module, name)
        if id(owner._parameters[attribute]) not in read:
            raise CaptureError(f"its graph does not read {name!r}")


def _get_attrs(graph: fx.GraphModule, module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [owner_of(module, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
