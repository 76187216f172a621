"""The example of a call: read from what users write, and run on a model without leaving a trace of it."""

import copy
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from diffq_fx import _compat

if TYPE_CHECKING:  # in typing since Python 3.11
    from typing_extensions import Self

Mode = Literal["train", "eval", "eval without grad"]
MODES: tuple[Mode, ...] = ("train", "eval", "eval without grad")

_SEED = 20210422  # any fixed one: the original and the prepared model must draw the same dropout


@dataclass(frozen=True, eq=False)
class Example:
    """Positional and keyword arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_inputs: Any) -> "Self":
        """Read what users write: a tensor, a tuple (or list) of positional arguments, a dict of keyword arguments, or one object.

        Raises:
            TypeError: it is text, a number or None.
            ValueError: a tensor is nested.

        Example:
            >>> x = torch.zeros(2)
            >>> len(Example.of({"x": x}).kwargs), len(Example.of((x, x)).args), len(Example.of(x).args)
            (1, 2, 1)
        """
        if isinstance(example_inputs, str | bytes | int | float | complex | None):
            raise TypeError(
                "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments, "
                f"got {type(example_inputs).__name__}."
            )
        if isinstance(example_inputs, Example):
            example = cls(example_inputs.args, example_inputs.kwargs)
        elif isinstance(example_inputs, Mapping):
            example = cls((), dict(example_inputs))
        else:
            several = isinstance(example_inputs, tuple | list) and not isinstance(example_inputs, PackedSequence)
            example = cls(tuple(example_inputs) if several else (example_inputs,), {})
        if any(tensor.is_nested for tensor in example.tensors):
            raise ValueError("example_inputs holds a nested tensor, which no graph and no ONNX file takes. Give a padded one.")
        return example

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in the order of the exported graph's inputs."""
        return tensors_of((self.args, self.kwargs))

    def __str__(self) -> str:
        """Types and shapes, for messages."""
        return ", ".join([_described(a) for a in self.args] + [f"{k}={_described(v)}" for k, v in self.kwargs.items()])

    def map(self, change: Callable[[Tensor], Any]) -> "Self":
        """Replace each tensor."""
        return type(self)(*_compat.map_tensors(change, (self.args, self.kwargs)))

    def run(self, model: nn.Module) -> Any:
        """The model's output on copies of the tensors: a forward may change its arguments in place, and the example is used again."""
        own = self.map(Tensor.clone)
        return model(*own.args, **own.kwargs)

    def outcome(self, model: nn.Module, mode: Mode, *, inputs_require_grad: bool = False) -> tuple[Any, "Example", list[Tensor]]:
        """Run the model in one mode on a copy of the arguments, from a fixed seed; the random state is as before.

        Returns:
            The output, the arguments as the call left them, and the inputs that gather gradients.
        """
        own, leaves = copy.deepcopy(self), []
        if inputs_require_grad:
            leaves = [tensor.requires_grad_() for tensor in own.tensors if tensor.is_floating_point()]
            copies = {id(leaf): leaf.clone() for leaf in leaves}  # a forward may change its arguments in place, but no leaf
            own = own.map(lambda tensor: copies.get(id(tensor), tensor))
        model.train(mode == "train")
        with restored_random_state(_SEED), torch.set_grad_enabled(mode != "eval without grad"):
            return model(*own.args, **own.kwargs), own, leaves


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put a model in eval(), and then each of its modules back in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{value.dtype} {tuple(shape)} on {value.device}"


@contextmanager
def restored_random_state(seed: int | None = None) -> Iterator[None]:
    """Put the random states of torch (CPU and GPUs), Python and numpy back as they are now; a seed is what they begin with meanwhile."""
    python_state, numpy_state = random.getstate(), _numpy_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            if seed is not None:
                _seed_everything(seed)
            yield
    finally:
        random.setstate(python_state)
        if numpy_state is not None:
            sys.modules["numpy.random"].set_state(numpy_state)


def _seed_everything(seed: int) -> None:
    if torch.cuda.is_initialized():
        torch.manual_seed(seed)
    else:  # torch would keep the seed for GPUs that are used later, in place of the user's own
        torch.default_generator.manual_seed(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
    random.seed(seed)
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed(seed)


def random_fingerprint() -> tuple[Any, ...]:
    """Equal to an earlier one unless torch (on the CPU), Python or numpy drew a random number in between."""
    return torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(_numpy_state())


def _numpy_state() -> Any:
    numpy_random = sys.modules.get("numpy.random")
    return None if numpy_random is None else numpy_random.get_state(legacy=False)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    if isinstance(tree, Tensor):
        return [tree]
    if tree is None or isinstance(tree, int | float | str | nn.Module):
        return []
    if type(tree) in (tuple, list, dict, OrderedDict):  # most trees are no more, and torch's pytree is slow
        return [tensor for part in (tree.values() if isinstance(tree, dict) else tree) for tensor in tensors_of(part)]
    return [leaf for leaf in _compat.tree_leaves(tree) if isinstance(leaf, Tensor)]
