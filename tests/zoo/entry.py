"""What the zoo knows about one model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the zoo: how to build it, how to call it, and what prepare must make of it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    """Example inputs; ``inputs(0)`` is the example, ``inputs(1)`` has another batch size and, where the model allows it, another length."""
    untraceable: str = ""
    """Why model scope must be refused, a pattern; empty where it must be taken."""
    weights: int
    """Quantized weights, counted by hand: a tied weight once."""
    skipped: tuple[str, ...] = ()
    """Parameters with two dimensions or more that stay in float."""
    frozen: tuple[str, ...] = ()
    """Weights with requires_grad=False."""
    unseen: tuple[str, ...] = ()
    """Weights that the example never reads."""
    no_onnx: Literal["", "control flow", "output type", "state", "random", "chance"] = ""
    """Why there is no ONNX file of it: torch refuses the float model (the first three), or a file cannot do what the model does; empty
    where there must be one. With "chance" the file does it sometimes, so nothing can be tested."""
    pickles: bool = True
    """torch.save takes the float model."""
    stateful: bool = False
    """A part of its state is not in the state_dict."""
    draws: bool = False
    """The output is random even in eval mode."""
    slow: bool = False

    @property
    def scope(self) -> Literal["model", "module"]:
        """The scope that prepare must choose by itself."""
        return "module" if self.untraceable else "model"

    def in_module_scope(self) -> "Entry":
        """The same model, for module scope though it could be traced as a whole."""
        return replace(self, name=f"{self.name}-module", untraceable="asked for")

    @property
    def asked(self) -> Literal["auto", "module"]:
        """What to ask prepare for."""
        return "module" if self.untraceable == "asked for" else "auto"

    def example(self, variant: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        inputs = self.inputs(variant)
        if isinstance(inputs, dict):
            return (), inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}

    def make(self) -> nn.Module:
        """The model with random weights, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return self.build()


def randn(*shape: int) -> torch.Tensor:
    """Normal values, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def tokens(vocabulary: int, *shape: int) -> torch.Tensor:
    """Token numbers, the same at every call."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(7))


def parameters_of(entries: list[Entry], evidence: frozenset[str] = frozenset()) -> list[Any]:
    """The entries as pytest parameters, the slow ones marked; all tests of one run in one process, which keeps what it has made.

    ``evidence`` names those that the gate leaves out.
    """

    def marks(entry: Entry) -> list[Any]:
        wanted = {"slow": entry.slow, "evidence": entry.name in evidence}
        return [pytest.mark.xdist_group(entry.name), *(getattr(pytest.mark, name) for name, is_wanted in wanted.items() if is_wanted)]

    return [pytest.param(entry, id=entry.name, marks=marks(entry)) for entry in entries]


def each_in_one_way(parameters: list[Any], ways: Sequence[str]) -> list[Any]:
    """All pytest parameters in all ways; the gate has one way of each, in turns."""

    def marks(number: int, turn: int) -> list[Any]:
        return [pytest.mark.evidence] if (number - turn) % len(ways) else []

    return [
        pytest.param(*each.values, way, id=f"{each.id}-{way}", marks=[*each.marks, *marks(number, turn)])
        for number, each in enumerate(parameters)
        for turn, way in enumerate(ways)
    ]
