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

    @abstractmethod
    def forward(self) -> Tensor:
        """The float weight, of the spec's shape and dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredWeight":
        """Follow the model to another device, and give the float weight in the type that it goes to; what is stored keeps its own."""
        buffer = next(self.buffers())
        self.spec = replace(self.spec, dtype=fn(torch.empty(0, dtype=self.spec.dtype, device=buffer.device)).dtype)
        return super()._apply(keeping_dtype(fn), recurse)

    @abstractmethod
    def footprint(self) -> Footprint:
        """The parts of its sizes."""

    def as_integers(self) -> "StoredWeight | None":
        """The same weight as an :class:`~diffq_fx.storage.IntegerWeight`, which exporters know, where that computes the same bit by bit."""
        return None
