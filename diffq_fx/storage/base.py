"""What a converted model holds in place of a float weight, whatever its method."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

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

    @abstractmethod
    def payload_bits(self) -> int:
        """Bits of the levels alone, each at the width it has learned."""

    @abstractmethod
    def container_payload_bits(self) -> int:
        """Bits of the levels alone in the container that holds them."""

    @abstractmethod
    def footprint(self) -> Footprint:
        """The parts of its sizes."""
