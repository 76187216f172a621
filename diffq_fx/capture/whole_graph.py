"""Model scope: the whole model as one GraphModule, every weight to quantize a get_attr node of its graph.

It is the model still: of its class, with its modules and its methods. A module that the graph runs through makes its own weights where
Python calls it, and the model's original forward runs in place of the graph once Python has changed what the graph was made from.
"""

import copy
import functools
import inspect
from typing import Any, cast

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module

from diffq_fx import _compat
from diffq_fx.capture.copies import copy_sharing_parameters
from diffq_fx.capture.readers import reading_modules
from diffq_fx.capture.scope import TakenOver, class_body, python_forward, refuse_new_class, refuse_ties, take_over, takeovers
from diffq_fx.capture.trace import CodeTracer, trace_in_both_modes
from diffq_fx.capture.watch import HOOKS, GraphUse, Reads, runs_foreign_code
from diffq_fx.errors import CaptureError, PreparationError
from diffq_fx.example import Example
from diffq_fx.selection import Selection

_NAMES_OF_FX = frozenset(dir(fx.GraphModule)) - frozenset(dir(nn.Module))


class CapturedModel(fx.GraphModule):
    """A GraphModule that is also of the class of the model that it was made from, and keeps all that the model holds."""

    original_class: Any
    taken_over: TakenOver
    graph_use: GraphUse

    @property
    def uses_graph(self) -> bool:
        """Whether calls run the graph; else they run the original forward."""
        return self.graph_use.stands()

    def recompile(self) -> Any:
        """Make the code of the graph, as fx does."""
        code = super().recompile()
        cls, of_the_graph, of_python = type(self), type(self).forward, python_forward(self.original_class)

        @functools.wraps(of_the_graph)
        def forward(self: "CapturedModel", *args: Any, **kwargs: Any) -> Any:
            refuse_ties(self)
            if self.uses_graph and not _compat.has_global_hooks():
                output = of_the_graph(self, *args, **kwargs)
                if not self.graph_use.may_change_within or self.uses_graph:
                    return output  # else the graph computed with what was read before, and this one call is made twice
            if self.graph_use.weights_within:
                change = self.graph_use.ended_by or "a hook was registered for all modules"
                raise PreparationError(
                    f"{change}, which the graph of the model cannot follow, and its own forward reads weights from "
                    f"{self.graph_use.weights_within}, where quantized ones cannot be put.\n"
                    "  Undo the change, make it before prepare, or let the forward read the weights from the modules that own them."
                )
            return of_python(self, *args, **kwargs)

        cls.forward = forward
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapturedModel":
        """Copy the graph and everything that the module holds."""
        refuse_new_class(type(self), type(self).__mro__[1])  # fx makes a class for each GraphModule
        copied = memo[id(self)] = _empty(self.original_class, self.taken_over)
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_graph"})
        copied._graph = copy.deepcopy(self.graph)
        copied._graph.owning_module = copied
        type(copied).forward = type(self).forward  # its code is the same
        return copied

    def __reduce__(self) -> Any:
        """Pickle as fx does; the body is a state, since the compression in it may refer to the model."""
        refuse_new_class(type(self), type(self).__mro__[1])
        _, (body, imports) = super().__reduce__()
        return _empty, (self.original_class, self.taken_over), (body, imports, _calls(self.graph))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As ``__reduce__``, whatever the model's own class does."""
        return self.__reduce__()

    def __setstate__(self, state: tuple[dict[str, Any], str, list[tuple[str, str]]]) -> None:
        """Restore: a pickle holds code, and fx makes the graph again by tracing it; that must give the graph that was saved."""
        body, imports, calls = state
        graph = cast(fx.Graph, reduce_graph_module(dict(body), imports).graph)
        if _calls(graph) != calls:
            raise CaptureError(
                f"the graph of the saved {self.original_class.__name__} cannot be made again. "
                "Save its state_dict() instead, and load it into a model prepared anew."
            )
        vars(self).update(body)
        self.graph = graph


class _WithoutInit(nn.Module):
    """Between GraphModule and the model's class: fx initializes what it makes, the model's own ``__init__`` wants its arguments."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def _empty(original: type[nn.Module], taken_over: TakenOver) -> CapturedModel:
    """A model with an empty graph and no parts."""
    made = type(original.__name__, (CapturedModel, _WithoutInit, original), class_body(original, taken_over))
    empty = made.__new__(made)
    empty.__init__({}, fx.Graph(tracer_cls=CodeTracer), original.__name__)
    return empty


def _calls(graph: fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, getattr(node.target, "__name__", str(node.target))) for node in graph.nodes if node.op.startswith("call")]


def _become(model: nn.Module, graph: fx.Graph, taken_over: TakenOver, use: GraphUse) -> CapturedModel:
    """Make a model its own GraphModule, in place: what refers to it still does."""
    empty = _empty(type(model), taken_over)
    attributes = {name: value for name, value in vars(empty).items() if name not in vars(nn.Module())}
    model.__class__ = type(empty)
    vars(model).update(attributes, graph_use=use)
    captured = cast(CapturedModel, model)
    captured.graph = graph
    return captured


def capture_model(model: nn.Module, example: Example, selection: Selection) -> CapturedModel:
    """Trace the whole model into one graph, which has the arguments that the example gives, and get_attr nodes for the weights.

    Returns:
        A GraphModule that shares the model's Parameters and has its own copies of everything else.

    Raises:
        CaptureError: says why a graph of the whole model would not be faithful.
    """
    _refuse_unfit(model, example, selection)
    reads = Reads()
    graph, tracer = trace_in_both_modes(model, selection, reads)
    for node in graph.find_nodes(op="placeholder"):
        node.args = ()  # a default that the example did not use was never traced
    graph._tracer_cls = CodeTracer  # what makes the graph of a pickle again
    private = copy_sharing_parameters(model)
    found = takeovers(private, reading_modules(private, tracer.readers, selection), selection.names())
    use = GraphUse()
    for path, module in private.named_modules():
        is_run_through = path in tracer.run_through
        names = reads.of(path) | ({"forward"} if is_run_through else set())
        if names:
            use.note(path, module, names, is_run_through=is_run_through)
        if path in found and path:
            take_over(module, found[path])
    within = (each.name for each in use.changeable if any(id(part) in selection.specs for part in each.contents))
    use.weights_within = next(within, "")
    called = {private.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")}
    use.may_change_within = any(runs_foreign_code(each) for module in called for each in module.modules())
    return _become(private, graph, found.get("", TakenOver()), use)


def _refuse_unfit(model: nn.Module, example: Example, selection: Selection) -> None:
    if _compat.has_global_hooks():
        raise CaptureError("a hook is registered for all modules (register_module_forward_hook or its like), which a graph would freeze")
    for path, module in model.named_modules():
        if any(vars(module)[kind] for kind in HOOKS) and any(selection.spec_of(parameter) for parameter in module.parameters()):
            raise CaptureError(f"{path or 'the model'} has a hook, which a graph would freeze")
    taken = sorted(name for name in _NAMES_OF_FX if hasattr(model, name))
    if taken:
        raise CaptureError(f"the model has a {taken[0]!r} of its own, and so has every GraphModule")
    signature = inspect.signature(model.forward)
    given = signature.bind(*example.args, **example.kwargs).arguments.keys()
    left_out = [
        each for name, each in signature.parameters.items() if name not in given or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if left_out:
        names = ", ".join(str(each.replace(annotation=each.empty, default=each.empty)) for each in left_out)
        raise CaptureError(f"the forward also takes {names}, which the example leaves out and a graph would lose")
