"""Trace a model into a graph in which every weight to quantize is a get_attr node, or say why that is not faithful."""

import keyword
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from diffq_fx.capture.copies import copy_sharing_parameters
from diffq_fx.capture.readers import CALLED_WHOLE, upwards
from diffq_fx.capture.scope import HANDED
from diffq_fx.capture.watch import Reads, same
from diffq_fx.errors import CaptureError, first_line
from diffq_fx.example import random_fingerprint, restored_random_state
from diffq_fx.selection import Selection
from diffq_fx.weights import owner_of


class _StrictProxy(fx.Proxy):
    """Refuses what a graph would lose without a word, and what would freeze a value or a size that Python looks at."""

    tracer: "_WeightTracer"

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):  # x.requires_grad = True is no operation
            raise self.tracer.refusal(f"the forward sets the attribute {name!r} of a tensor, which a graph would lose")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Attribute:
        return _StrictAttribute(self, name)

    def __hash__(self) -> int:
        if not self.tracer.reads.is_on:  # torch's own code, at work for fx
            return object.__hash__(self)
        raise self.tracer.refusal("the forward looks a tensor or its size up in a dict or set, which a graph would freeze")

    def __len__(self) -> int:
        raise self.tracer.refusal("the forward takes the length of a tensor ('len' is not supported in symbolic tracing)")

    def __str__(self) -> str:
        raise self.tracer.refusal("the forward makes a text of a tensor or its size, which a graph would freeze")

    def __format__(self, _: str) -> str:
        text = f"<{self.node.name}, text {len(self.tracer.texts)}>"
        self.tracer.texts.append(text)
        return text


class _StrictAttribute(_StrictProxy, Attribute):
    """The same for an attribute of a tensor, such as its shape."""


class _WeightTracer(fx.Tracer):
    """Traces through every module that holds a weight to quantize; all others stay calls, so that train()/eval() keep working.

    Refuses what a graph cannot hold, also for buffers: what Python decides on their values would be frozen.
    """

    proxy_buffer_attributes = True

    def __init__(self, selection: Selection, reads: Reads) -> None:
        super().__init__()
        self.selection, self.reads = selection, reads
        self.run_through: set[str] = {""}
        self.readers: dict[int, set[str]] = {}
        """Paths of the modules whose forwards read a weight, by the weight's identity."""
        self.refused: CaptureError | None = None
        """The first refusal; the forward may have caught it."""
        self.texts: list[str] = []
        """What stands for a size in texts that the forward makes, such as the message of an assertion."""

    def refusal(self, what: str) -> CaptureError:
        """Why there is no graph, to be raised."""
        self.refused = self.refused or CaptureError(what)
        return self.refused

    def to_bool(self, obj: Any) -> bool:
        raise self.refusal("the forward branches on a value or size of a tensor: such are no inputs to control flow in a graph")

    def iter(self, obj: Any) -> Any:
        raise self.refusal("the forward loops over a tensor or its sizes, whose number a graph would freeze")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StrictProxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _grad_state() != self._grad_state:
            raise self.refusal("the forward switches gradients on or off (torch.no_grad), which a graph would lose")
        if kind in ("get_attr", "call_module") and any(keyword.iskeyword(part) for part in str(target).split(".")):
            raise self.refusal(f"the name {str(target)!r} holds a keyword of Python, which a graph cannot write")
        return super().create_node(kind, target, *args, **kwargs)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._grad_state = _grad_state()
        try:
            return super().trace(root, concrete_args)
        finally:
            self.reads.is_on = False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        around = {path for name in self.selection.names() for path in upwards(name.rpartition(".")[0])}
        self._holders = {self.root.get_submodule(path) for path in around}
        self._names = {id(tensor): name for name, tensor in (*self.root.named_buffers(), *self.root.named_parameters())}
        made = super().create_args_for_root(root_fn, is_module, concrete_args)
        self.reads.is_on = True  # the forward begins
        return made

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module without a weight to quantize is a leaf, whatever its forward does."""
        return m not in self._holders

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As fx does, which looks for each among all parameters."""
        if self.reads.is_on and self.selection.spec_of(attr_val):
            self.readers.setdefault(id(attr_val), set()).add(self.scope.module_path)
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        with self.reads.paused():
            if name not in parameter_proxy_cache:
                parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        with self.reads.paused():
            return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an RNN or its like whole, with the weights it reads as inputs of its node."""
        path = self.path_of_module(m)
        if m in self._holders and "forward" in vars(m):
            raise self.refusal(f"{path} has a forward of its own on the instance, which a graph would lose")
        if not isinstance(m, CALLED_WHOLE) or m not in self._holders:
            self.run_through |= {path} if m in self._holders else set()
            return super().call_module(m, forward, args, kwargs)
        weights = {}
        with self.reads.paused():  # while tracing, to read a parameter is to make its node
            for name, parameter in m.named_parameters():
                if self.selection.spec_of(parameter):
                    weights[name] = getattr(*owner_of(m, name))
                    self.readers.setdefault(id(parameter), set()).add(path)
        return self.create_proxy("call_module", path, args, {**kwargs, HANDED: weights})


def _grad_state() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class CodeTracer(fx.Tracer):
    """Makes the graph of a pickle again, from its code."""

    proxy_buffer_attributes = True


def trace_in_both_modes(model: nn.Module, selection: Selection, reads: Reads) -> tuple[fx.Graph, _WeightTracer]:
    """Trace a model in train and in eval mode, and in another state of torch; return the graph if it is one and the same, and its tracer.

    Tracing runs on a copy that shares the parameters, and that no trace may change; ``reads`` records what Python reads meanwhile.
    A forward that is not seen to ask for its mode is traced twice, once in each mode; one that is, in each mode in each state.

    Raises:
        CaptureError: says why a graph would not be faithful.
    """
    watched, tracer = reads.watch(copy_sharing_parameters(model)), _WeightTracer(selection, reads)
    graph, code = _traced(watched.train(), tracer, nullcontext)

    def is_another(training: bool, state: Callable[[], AbstractContextManager[None]]) -> bool:
        return _traced(watched.train(training), _WeightTracer(selection, reads), state)[1] != code

    differs = is_another(False, _other_state)  # both at once, since a mode that was read in some other way was not seen
    if differs or any("training" in names for names in reads.names.values()):
        what = "the forward does something else {}, which one graph cannot"
        if is_another(False, nullcontext):
            raise CaptureError(what.format("in train() than in eval()"))
        if differs or is_another(True, _other_state):
            raise CaptureError(what.format("under torch.autocast or torch.no_grad, or in inference mode"))
    return graph, tracer


@contextmanager
def _other_state() -> Iterator[None]:
    """Autocast to float16 and inference mode: what a forward may ask torch about, and a graph would freeze the answer to.

    It is set without torch.autocast, which warns of a device that is not here and which a forward may not enter.
    """
    before = {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.float16)
        with torch.inference_mode():
            yield
    finally:
        for device, (enabled, dtype) in before.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _traced(module: nn.Module, tracer: _WeightTracer, state: Callable[[], AbstractContextManager[None]]) -> tuple[fx.Graph, str]:
    """One trace with its code, and the proof that the forward did nothing beside what the graph holds."""
    with restored_random_state(), _refused_while_tracing(tracer):
        before, random_before = _state_of(module), random_fingerprint()
        try:
            if "forward" in vars(module):
                raise tracer.refusal("a forward of its own is set on the instance, which a graph would lose")
            with state():
                graph = tracer.trace(module)
        except Exception as err:  # a traced forward is the user's code and may raise anything
            raise tracer.refused or CaptureError(first_line(err)) from err
        if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes):
            tracer.refusal("the forward makes a tensor that does not depend on its inputs, which a graph would freeze")
        if random_fingerprint() != random_before:
            tracer.refusal("the forward draws random numbers that do not depend on its inputs, which a graph would freeze")
        if changes := _changes(before, _state_of(module)):
            tracer.refusal(f"the forward changes {', '.join(changes)} of the module, which a graph would do once and never again")
        code = graph.python_code("self").src
        if not all(text in code for text in tracer.texts):
            tracer.refusal("the forward makes a text of a tensor or its size, which a graph would freeze")
        if tracer.refused:
            raise tracer.refused
    return graph, code


def _state_of(model: nn.Module) -> dict[str, list[Any]]:
    """What a forward may change on a model, by name: each attribute, what a list, dict or set in it holds, and a tensor's version."""
    state = {}
    for path, module in model.named_modules():
        own = vars(module)
        registries = {name: own[name] for name in ("_parameters", "_buffers", "_modules")}
        entries = [entry for registry in registries.values() for entry in registry.items()]
        for name, value in (*entries, *((name, value) for name, value in own.items() if name not in registries)):
            held = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value) if isinstance(value, list) else []
            held += [frozenset(value)] if isinstance(value, set) else []
            held += [value._version] if isinstance(value, Tensor) and not value.is_inference() else []
            state[f"{path}.{name}".removeprefix(".")] = [value, *held]
    return state


def _changes(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> list[str]:
    pairs = ((name, before.get(name, []), now.get(name, [])) for name in {**before, **now})
    return [name for name, a, b in pairs if len(a) != len(b) or not all(map(same, a, b))]


@contextmanager
def _refused_while_tracing(tracer: _WeightTracer) -> Iterator[None]:
    """Refuse what fx would inline or lose without a word, where the forward calls it."""
    here = threading.get_ident()  # other threads train on meanwhile

    def refusing(owner: type, name: str, what: str) -> Any:
        original = getattr(owner, name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:
                return original(*args, **kwargs)
            raise tracer.refusal(f"the forward uses {what}, which a graph would lose")

        return mock.patch.object(owner, name, refuse)

    apply = vars(torch.autograd.Function)["apply"]

    def apply_or_refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, fx.Proxy) for arg in args):
            raise tracer.refusal(f"the forward uses the autograd.Function {cls.__name__}, whose backward a graph would lose")
        return apply.__get__(None, cls)(*args, **kwargs)

    kept = "activation checkpointing or other hooks on saved tensors"
    with (
        torch.enable_grad(),
        refusing(torch.autograd.graph.saved_tensors_hooks, "__enter__", kept),
        refusing(torch.utils.checkpoint.CheckpointFunction, "apply", kept),
        refusing(torch.amp.autocast_mode.autocast, "__enter__", "a region of autocast"),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(apply_or_refuse)),
    ):
        yield
