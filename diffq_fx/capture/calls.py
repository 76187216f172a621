"""The example call: running a model the way its user does, without leaving a trace of it."""

import copy
import pickle
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffq_fx import _compat

Mode = Literal["train", "eval", "eval without grad"]
MODES: tuple[Mode, ...] = ("train", "eval", "eval without grad")

_SEED = 20210422  # any fixed one: the original and the prepared model must draw the same dropout


@dataclass(frozen=True)
class ExampleCall:
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(example_inputs: Any) -> "ExampleCall":
        """From what users write: one tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""
        if isinstance(example_inputs, ExampleCall):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return ExampleCall((), dict(example_inputs))
        if isinstance(example_inputs, tuple | list):
            return ExampleCall(tuple(example_inputs), {})
        return ExampleCall((example_inputs,), {})

    def run(self, model: nn.Module, mode: Mode) -> Any:
        """Run the model in one mode on its own copy of the arguments, from a fixed seed; the random state is as before."""
        return self.outcome(model, mode)[0]

    def outcome(self, model: nn.Module, mode: Mode) -> tuple[Any, Any]:
        """Run the model as :meth:`run` does; its output, and the arguments as it left them."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        devices = sorted({t.device.index or 0 for t in tensors_of((args, kwargs)) if t.is_cuda})
        model.train(mode == "train")
        with restored_random_state(devices), torch.set_grad_enabled(mode != "eval without grad"):
            _seed_everything()
            return model(*args, **kwargs), (args, kwargs)


def _seed_everything() -> None:
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed(_SEED)


@contextmanager
def restored_random_state(devices: Sequence[int] = ()) -> Iterator[None]:
    """Put the random states of torch (CPU and these CUDA devices), Python and numpy back as they are now."""
    python_state = random.getstate()
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = numpy_random.get_state(legacy=False) if numpy_random else None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


def random_fingerprint() -> tuple[Any, ...]:
    """Equal to an earlier one unless torch (on the CPU), Python or numpy drew a random number in between."""
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = pickle.dumps(numpy_random.get_state(legacy=False)) if numpy_random else b""
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in _compat.tree_leaves(tree) if isinstance(leaf, Tensor)]


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """The tensor, or the ordinary tensors that a sparse one is made of."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one layout hold the same numbers."""
    return all(torch.equal(x, y) for x, y in zip(strided_parts(a), strided_parts(b), strict=True))


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Copy a model's modules and buffers, but share its Parameters: no second copy of the weights.

    Raises:
        TypeError: the model cannot be copied (``copy.deepcopy`` says why).
    """
    return copy_replacing(model, {id(parameter): parameter for parameter in model.parameters()})


def copy_replacing(model: nn.Module, replaced: Mapping[int, Tensor | nn.Module]) -> nn.Module:
    """Copy a model, with other tensors or modules (by the identity of what they replace) in the copy, wherever the model holds them.

    A model may keep results of its last forward (an auxiliary loss, attention weights); torch does not copy a tensor with a
    history, so the copy gets its value.
    """
    memo: dict[int, Any] = dict(replaced)
    for module in model.modules():
        memo.update({id(kept): kept.detach().clone() for kept in tensors_of(list(vars(module).values())) if not kept.is_leaf})
    return copy.deepcopy(model, memo)


class ModelState:
    """What a forward may change on a model, as it is now: attributes, what lists and dicts hold, values of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(path, module, dict(vars(module))) for path, module in model.named_modules()]
        values = {id(value): value for _, _, attributes in self._modules for value in attributes.values()}
        self._containers = {key: (value, _contents(value)) for key, value in values.items() if isinstance(value, list | dict | set)}
        plain = [(f"{path}.{name}", value) for path, _, attributes in self._modules for name, value in attributes.items()]
        tensors = [*model.named_buffers(), *((name, value) for name, value in plain if isinstance(value, Tensor))]
        self._tensors = [(name.lstrip("."), tensor, tensor._version, tensor.detach().clone()) for name, tensor in tensors]

    def changes(self) -> list[str]:
        """Names of the attributes, buffers and plain tensors that are not what they were."""
        names = [name for name, tensor, version, _ in self._tensors if tensor._version != version]
        for path, module, attributes in self._modules:
            now = vars(module)
            for name in [name for name in {**attributes, **now} if not self._is_as_it_was(name, attributes, now)]:
                kept = self._containers.get(id(now.get(name))) if name in _REGISTRIES else None
                changed = _changed_entries(kept[1], now[name]) if kept else [name]
                names += [f"{path}.{each}".removeprefix(".") for each in changed]
        return names

    def _is_as_it_was(self, name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
        if name not in before or name not in now or not _same(before[name], now[name]):
            return False
        _, contents = self._containers.get(id(before[name]), (None, None))
        return contents is None or _same_contents(contents, _contents(now[name]))

    def restore(self) -> None:
        """Put everything back."""
        for _, module, attributes in self._modules:
            now = vars(module)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update(attributes)
        for value, contents in self._containers.values():
            if not _same_contents(contents, _contents(value)):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)
        with torch.no_grad():
            for _, tensor, _, value in self._tensors:
                if not same_values(tensor, value):  # the version does not tell: batch norm writes its statistics past it
                    tensor.detach().copy_(value)


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _changed_entries(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [name for name in {**before, **now} if before.get(name) is not now.get(name)]


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)


def _contents(value: Any) -> Any:
    """A plain copy of a list, dict or set."""
    return next(plain(value) for plain in (list, dict, set) if isinstance(value, plain))


def _same_contents(a: Any, b: Any) -> bool:
    if isinstance(a, set):
        return a == b
    pairs = zip(a, b, strict=False) if isinstance(a, list) else ((a[key], b.get(key)) for key in a)
    return len(a) == len(b) and all(_same(x, y) for x, y in pairs)


@contextmanager
def restored_state(model: nn.Module) -> Iterator[ModelState]:
    """Put attributes, buffers and the train/eval flags of a model back as they are now."""
    state = ModelState(model)
    try:
        yield state
    finally:
        state.restore()
