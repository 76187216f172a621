"""What a converted model holds in place of a float weight, whatever its method."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffq_fx.functional.precision import keeping_dtype
from diffq_fx.storage.footprint import Footprint
from diffq_fx.weights import WeightSpec


class StoredWeight(nn.Module, ABC):
    """The storage of one quantized weight; calling it gives the float weight. One subclass per kind of storage."""

    spec: WeightSpec
    packed_buffer: ClassVar[str] = "levels"
    """The buffer that the storage's operator reads first; exporters find the weight by its name."""

    def __init__(self, spec: WeightSpec, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.float_like = _nothing_of(spec.dtype, device)
        """A parameter without elements: code that asks ``next(model.parameters())`` finds the type and the device of the float weight."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The float weight, of the spec's shape and dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredWeight":
        """Follow the model to another device, and give the float weight in the type that it goes to; what is stored keeps its own."""
        found = fn(self.float_like.detach())
        super()._apply(keeping_dtype(fn), recurse)
        self.spec, self.float_like = replace(self.spec, dtype=found.dtype), _nothing_of(found.dtype, found.device)
        return self

    @abstractmethod
    def footprint(self) -> Footprint:
        """The parts of its sizes."""

    def as_integers(self) -> "StoredWeight | None":
        """The same weight as an :class:`~diffq_fx.storage.IntegerWeight`, which exporters know, where that computes the same bit by bit."""
        return None


def _nothing_of(dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
