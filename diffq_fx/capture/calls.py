"""The example call: running a model the way its user does, without leaving a trace of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

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
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        devices = sorted({t.device.index or 0 for t in tensors_of((args, kwargs)) if t.is_cuda})
        model.train(mode == "train")
        with torch.random.fork_rng(devices), torch.set_grad_enabled(mode != "eval without grad"):
            torch.manual_seed(_SEED)
            return model(*args, **kwargs)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """Copy a model's modules and buffers, but share its Parameters: no second copy of the weights.

    Raises:
        TypeError: the model cannot be copied (``copy.deepcopy`` says why).
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def restored_state(model: nn.Module) -> Iterator[None]:
    """Put the buffers and the train/eval flags of a model back as they are now."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, training in flags:
            module.training = training
