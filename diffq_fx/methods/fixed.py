"""What the integer methods with a fixed number of bits share: their settings and the grid they round on."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffq_fx.arguments import check_whole
from diffq_fx.functional.groups import GroupSize
from diffq_fx.methods.base import Method, check_group, straight_through
from diffq_fx.methods.grid import GridQuantizer
from diffq_fx.weights import WeightSpec


@dataclass(frozen=True, kw_only=True)
class FixedBits(Method):
    """Settings of a method whose weights all have the same number of bits."""

    bits: int = 4
    """Width of every weight, 1 to 16."""
    group_size: GroupSize = "channel"
    """Weights that share a scale: "tensor", "channel" (one output channel), or a block of this many inputs."""

    least_bits: ClassVar[int] = 1
    """Smallest width that the method can have."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the setting and the value."""
        name = type(self).__name__
        check_whole(name, "bits", self.bits, self.least_bits, 16)
        check_group(name, "group_size", self.group_size)
        if self.group_size == 1:
            raise ValueError(f"{name}: group_size=1 would store a scale for every weight; use a larger block.")
        self.check_common()


def check_rate(method: str, rate: Any) -> None:
    """Refuse a rate that is no probability."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"{method}: rate must be from 0 to 1, got {rate!r}.")


class FixedBitsQuantizer(GridQuantizer):
    """A quantizer with the same width everywhere: true rounding in training and in eval, the gradient of the weight is the identity.

    Buffers:
        width: float32, whose average does no harm, shape of the spec's ``bits_layout``; made of the settings, not saved.
    """

    width: Tensor

    def __init__(self, spec: WeightSpec, bits: int, device: torch.device) -> None:
        super().__init__(spec)
        self.register_buffer("width", torch.full(spec.bits_layout.shape, bits, dtype=torch.float32, device=device), persistent=False)

    @property
    def can_make_again(self) -> bool:
        """What it is made of is the weight and the method's parameters alone."""
        return True

    def training_weight(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        return straight_through(weight, self.rounded_weight(weight.detach()))

    def rounded_bits(self) -> Tensor:
        """The width of each group."""
        return self.width.round().to(torch.int32)
