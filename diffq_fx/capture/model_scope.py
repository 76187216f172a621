"""Model scope: the whole model as one GraphModule, every weight to quantize a get_attr node of its graph."""

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module

from diffq_fx.capture.calls import ExampleCall, copy_sharing_parameters
from diffq_fx.capture.consumers import hooked_modules
from diffq_fx.capture.plan import WeightPlan
from diffq_fx.capture.scopes import call_whole
from diffq_fx.capture.tracing import OwnForwardTracer, WeightTracer, omitted_arguments, trace_in_both_modes
from diffq_fx.errors import CaptureError


class CapturedModel(fx.GraphModule):
    """A GraphModule that keeps, through copies and pickles, also what its graph does not read: unused and tied names, the compression."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapturedModel":
        """Copy the graph and everything that the module holds."""
        copied = cast("CapturedModel", super().__deepcopy__(memo))
        type(copied).__name__ = type(self).__name__  # fx makes a class for each instance, and names the copy's anew
        for registry in ("_parameters", "_buffers"):  # the compression knows these and not those that fx made
            copied.__dict__[registry] = memo[id(getattr(self, registry))]
        graft(self, copied, lambda value: copy.deepcopy(value, memo))
        return copied

    def __reduce__(self) -> Any:
        """Pickle as fx does, and keep what fx drops; the body is a state, since the compression in it may refer to the model."""
        _, (body, imports) = super().__reduce__()
        return _empty, (), (body, imports, type(self).__name__, _calls(self.graph))

    def __setstate__(self, state: tuple[dict[str, Any], str, str, list[tuple[str, str]]]) -> None:
        """Restore: a pickle holds code, and fx makes the graph again by tracing it; that must give the graph that was saved."""
        body, imports, name, calls = state
        graph = cast(fx.Graph, reduce_graph_module(dict(body), imports).graph)
        if _calls(graph) != calls:
            raise CaptureError(
                f"the graph of the saved {name} cannot be made again. "
                "Save its state_dict() instead, and load it into a model prepared anew."
            )
        source = nn.Module()
        source.__dict__.update(body)
        self.__init__(source, graph, name)
        self._modules.update(source._modules)  # fx makes new containers; the compression knows those that were saved
        self._parameters, self._buffers = source._parameters, source._buffers
        self._load_state_dict_post_hooks = source._load_state_dict_post_hooks
        graft(source, self)


def _empty() -> CapturedModel:
    return CapturedModel.__new__(CapturedModel)


def _calls(graph: fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, getattr(node.target, "__name__", str(node.target))) for node in graph.nodes if node.op.startswith("call")]


def graft(source: nn.Module, target: nn.Module, duplicate: Callable[[Any], Any] = lambda value: value) -> None:
    """Give ``target`` every submodule, parameter, buffer and plain attribute of ``source`` that it lacks, under the same names.

    fx.GraphModule keeps only what its graph reads, in the order in which it reads it, and makes every buffer persistent. An optimizer's
    saved state goes by the order of the parameters, so that must be the source's too.
    """
    target.training = source.training
    for name, value in source.__dict__.items():
        if name not in target.__dict__ and name not in ("_graph", "_code"):
            object.__setattr__(target, name, duplicate(value))
    for name, parameter in source._parameters.items():
        if name not in target._parameters:
            target.register_parameter(name, duplicate(parameter))
    for name, buffer in source._buffers.items():
        if name not in target._buffers:
            target.register_buffer(name, duplicate(buffer))
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    for name, child in source._modules.items():
        mine = target._modules.get(name)
        if mine is None:
            target._modules[name] = duplicate(child)
        elif child is not None and type(mine) is nn.Module:  # a container that fx made: it holds only what the graph reads
            graft(child, mine, duplicate)
    for registry in ("_parameters", "_buffers", "_modules"):
        _reorder(getattr(target, registry), list(getattr(source, registry)))


def _reorder(registry: dict[str, Any], names: list[str]) -> None:
    """Sort the entries of a dict into the order of ``names``, in place; others come last."""
    entries = {name: registry[name] for name in names if name in registry} | registry
    registry.clear()
    registry.update(entries)


def capture_model(model: nn.Module, call: ExampleCall, plan: WeightPlan) -> CapturedModel:
    """Trace the whole model into one graph.

    Args:
        model: the float model; not changed.
        call: the example; the graph has the arguments that it gives.
        plan: the weights that must be get_attr nodes.

    Returns:
        A GraphModule that shares the model's Parameters and has its own copies of everything else.

    Raises:
        CaptureError: says why a graph of the whole model would not be faithful.
    """
    hooked = hooked_modules(model, plan)
    if hooked:
        raise CaptureError(f"{hooked[0]} has a hook, which a graph would freeze")
    omitted = omitted_arguments(model, call)
    if omitted:
        raise CaptureError(f"the forward also takes {', '.join(omitted)}, which the example leaves out and a graph would lose")
    graph, tracer = trace_in_both_modes(lambda training: copy_sharing_parameters(model).train(training), lambda: WeightTracer(plan))
    private = copy_sharing_parameters(model)
    for path in tracer.called_whole:
        call_whole(private.get_submodule(path))
    for node in graph.find_nodes(op="placeholder"):
        node.args = ()  # a default that the example did not use was never traced
    graph._tracer_cls = OwnForwardTracer  # what makes the graph of a pickle again
    captured = CapturedModel(private, graph, type(model).__name__)
    graft(private, captured)
    for path, module in private.named_modules():
        captured.get_submodule(path).training = module.training
    return captured
