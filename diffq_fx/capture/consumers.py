"""Find out which module reads each weight, by running the example under a probe.

The reader of a weight need not be its owner: MultiheadAttention reads ``out_proj.weight``, nn.TransformerEncoderLayer in its fast path
reads the weights of all its children. The probe itself switches that path off, so such layers are known by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from diffq_fx.capture.calls import MODES, ExampleCall, tensors_of
from diffq_fx.capture.plan import WeightPlan

_READS_ITS_CHILDREN = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


class _ReadProbe(TorchFunctionMode):
    """Notes, for every weight that a torch function computes with, the module whose forward is running."""

    def __init__(self, plan: WeightPlan, stack: list[nn.Module], readers: dict[int, set[nn.Module]]) -> None:
        super().__init__()
        self.plan, self.stack, self.readers = plan, stack, readers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.stack and tensors_of(result):  # reading .dtype or .shape is not a use
            for tensor in tensors_of((args, kwargs)):
                if self.plan.spec_of(tensor):
                    self.readers.setdefault(id(tensor), set()).add(self.stack[-1])
        return result


@contextmanager
def _module_stack() -> Iterator[list[nn.Module]]:
    """The modules whose forwards are running, innermost last."""
    stack: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    hooks = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def find_consumers(model: nn.Module, call: ExampleCall, plan: WeightPlan) -> tuple[dict[str, list[str]], list[str]]:
    """Run the example in train, eval and eval without grad, and see who reads which weight.

    Args:
        model: a copy that may be run (its buffers change).
        call: the example.
        plan: the weights of interest.

    Returns:
        For every consuming module (by path) the names, relative to it, of the weights it reads; and the names of the weights that the
        example never read, which are given to their owners.
    """
    readers: dict[int, set[nn.Module]] = {}
    with _module_stack() as stack:
        for mode in MODES:
            with _ReadProbe(plan, stack, readers):
                call.run(model, mode)
    paths = {module: path for path, module in model.named_modules()}
    uses: list[tuple[str, str]] = []
    unseen: list[str] = []
    for key, spec in plan.specs.items():
        frames = {_climb(paths[module], spec.names) for module in readers.get(key, ()) if module in paths}
        if not frames:
            unseen.append(spec.name)
            frames = {(name.rpartition(".")[0], name) for name in spec.names}
        uses.extend((_reader_above(model, path), name) for path, name in frames)
    return _by_consumer(uses), unseen


def _climb(path: str, names: tuple[str, ...]) -> tuple[str, str]:
    """From the reading module up to the nearest one that contains the weight under one of its names."""
    while True:
        for name in names:
            if not path or name.startswith(path + "."):
                return path, name
        path = path.rpartition(".")[0]


def _reader_above(model: nn.Module, path: str) -> str:
    """The outermost module at or above ``path`` that is known to read its children's weights."""
    parts = path.split(".") if path else []
    for length in range(len(parts) + 1):
        above = ".".join(parts[:length])
        if isinstance(model.get_submodule(above), _READS_ITS_CHILDREN):
            return above
    return path


def _by_consumer(uses: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Group by consumer; where one consumer contains another of the same weight, the outer one takes it."""
    consumers: dict[str, list[str]] = {}
    for path, name in uses:
        if any(other == name and path != outer and (not outer or path.startswith(outer + ".")) for outer, other in uses):
            continue
        relative = name[len(path) + 1 :] if path else name
        if relative not in consumers.setdefault(path, []):
            consumers[path].append(relative)
    return consumers


def hooked_modules(model: nn.Module, plan: WeightPlan) -> list[str]:
    """Paths of modules that hold weights and have hooks of the user's, which a traced graph would bake in or lose."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        path or "the model"
        for path, module in model.named_modules()
        if any(getattr(module, kind) for kind in kinds) and any(plan.spec_of(parameter) for parameter in module.parameters())
    ]
