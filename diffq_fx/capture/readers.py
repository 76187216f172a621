"""Find out which module reads each weight, by running the example under a probe.

The reader of a weight need not be its owner: MultiheadAttention reads ``out_proj.weight``, nn.TransformerEncoderLayer in its fast path
reads the weights of all its children. The probe itself switches that path off, so such layers are known by name.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from diffq_fx.errors import CaptureError
from diffq_fx.example import MODES, Example, tensors_of
from diffq_fx.passes.annotate_weights import Reader, completed
from diffq_fx.selection import Selection

CALLED_WHOLE = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.EmbeddingBag,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.Transformer,
)
"""Modules of torch whose forward cannot be traced, or should not be; they read their weights as one."""

_READS_ITS_CHILDREN = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass
class _Uses:
    """Who reads one weight: modules, and the functions in them."""

    modules: set[nn.Module] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)


class _ReadProbe(TorchFunctionMode):
    """Notes, for every weight that a torch function computes with, the function and the module whose forward is running."""

    def __init__(self, keys: dict[int, int], selection: Selection, stack: list[nn.Module], uses: dict[int, _Uses]) -> None:
        super().__init__()
        self.keys, self.selection, self.stack, self.uses = keys, selection, stack, uses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.stack and tensors_of(result):  # reading .dtype or .shape is not a use
            for tensor in tensors_of((args, kwargs)):
                if id(tensor) in self.keys:
                    uses = self.uses.setdefault(self.keys[id(tensor)], _Uses())
                    uses.modules.add(self.stack[-1])
                    uses.readers.append(self._reader(func, args, tensor))
                elif spec := self.selection.spec_of(tensor):
                    raise CaptureError(
                        f"weight {spec.name!r} is read from the model that was given, by a copy of it: a function or a global holds it"
                    )
        return result

    def _reader(self, func: Any, args: Any, tensor: Any) -> Reader:
        whole = next((module for module in self.stack if isinstance(module, CALLED_WHOLE)), None)
        if whole is not None:
            return type(whole).__name__, None
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        return name, next((i for i, each in enumerate(args) if each is tensor), None)


@contextmanager
def _module_stack() -> Iterator[list[nn.Module]]:
    """The modules whose forwards are running, innermost last."""
    stack: list[nn.Module] = []

    def leave(*_: Any) -> None:
        stack.pop()

    with (
        module_hooks.register_module_forward_pre_hook(lambda module, _: stack.append(module)),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ):
        yield stack


def find_readers(model: nn.Module, example: Example, selection: Selection) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Run the example in train, eval and eval without grad, and see who reads which weight.

    The model is a copy that may be run, with parameters of its own; the selection's specs are completed by what reads them.

    Returns:
        For every reading module (by path) the names, relative to it, of the weights it reads; and the names of the weights that the
        example never read, which are given to their owners.

    Raises:
        CaptureError: a weight is read past the model, where no copy has it.
    """
    keys = {id(model.get_parameter(spec.name)): key for key, spec in selection.specs.items()}
    uses: dict[int, _Uses] = {}
    with _module_stack() as stack:
        for mode in MODES:
            with _ReadProbe(keys, selection, stack, uses):
                example.outcome(model, mode)
    paths = {module: path for path, module in model.named_modules()}
    seen = {key: {paths[module] for module in each.modules if module in paths} for key, each in uses.items()}
    unseen = [spec.name for key, spec in selection.specs.items() if not seen.get(key)]
    for key, spec in selection.specs.items():
        selection.specs[key] = completed(spec, uses[key].readers if seen.get(key) else [("nothing in the example", None)])
    return reading_modules(model, seen, selection), unseen


def reading_modules(model: nn.Module, seen: Mapping[int, set[str]], selection: Selection) -> dict[str, tuple[str, ...]]:
    """From who reads a weight (paths, by the weight's identity) to who makes it: a module that contains it, each weight once in a call.

    Where one reader contains another of the same weight, the outer one takes it.
    """
    uses: dict[tuple[str, str], None] = {}
    for key, spec in selection.specs.items():
        owners = [name.rpartition(".")[0] for name in spec.names]
        for reader in sorted(seen.get(key) or owners):
            path, name = next((path, name) for path in upwards(reader) for name in spec.names if not path or name.startswith(f"{path}."))
            known = [outer for outer in upwards(path) if isinstance(model.get_submodule(outer), _READS_ITS_CHILDREN)]
            uses[known[-1] if known else path, name] = None
    readers: dict[str, tuple[str, ...]] = {}
    for path, name in uses:
        if not any((outer, name) in uses for outer in upwards(path) if outer != path):
            readers[path] = (*readers.get(path, ()), name.removeprefix(f"{path}."))
    return readers


def upwards(path: str) -> Iterator[str]:
    """A path, and those of the modules around it, up to the model itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
