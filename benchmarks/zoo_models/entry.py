"""What the benchmark knows about one architecture of somebody else's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
"""Of the example; the file runs at one more."""


@dataclass(frozen=True)
class Architecture:
    """One architecture: how its library builds it, and what it is called with."""

    name: str
    library: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    """A tensor, a tuple or a dict for a batch size, the same at every call."""

    def example(self, batch: int = BATCH) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        inputs = self.inputs(batch)
        if isinstance(inputs, dict):
            return (), inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}

    def make(self) -> nn.Module:
        """The model with random weights, the same at every call."""
        torch.manual_seed(5)
        return self.build()


def randn(*shape: int) -> Tensor:
    """Normal values, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def tokens(vocabulary: int, *shape: int) -> Tensor:
    """Token numbers above the special ones, the same at every call."""
    return torch.randint(4, vocabulary, shape, generator=torch.Generator().manual_seed(7))


def images(size: int = 64, channels: int = 3) -> Callable[[int], Tensor]:
    """A batch of square images."""
    return lambda batch: randn(batch, channels, size, size)
