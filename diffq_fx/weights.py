"""What the library knows about one weight: the frozen facts that every pass, method and exporter agrees on."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffq_fx.errors import DivergenceError
from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupLayout, GroupSize, combine

QUANTIZER_SUFFIX = "_quantizer"
"""``<weight>_quantizer`` is the quantizer of a prepared model, registered beside its weight."""
STORED_SUFFIX = "_quantized"
"""``<weight>_quantized`` is the stored weight of a converted model, where the weight was."""


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter ``name`` directly, and the parameter's own name there."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def names_of(module: nn.Module, parameter: object) -> list[str]:
    """All names of a parameter, which may be tied."""
    return [name for name, each in module.named_parameters(remove_duplicate=False) if each is parameter]


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One weight to quantize: which, its shape, its output channel axis and how it is divided into groups.

    Example:
        >>> spec = WeightSpec(name="0.weight", shape=(8, 64), axis=0, group_size=16)
        >>> spec.rows, spec.columns, spec.bits_layout.num_groups
        (8, 64, 32)
    """

    name: str
    """The weight's name in the model's state_dict."""
    aliases: tuple[str, ...] = ()
    """The other names of a tied weight. All of them share one quantizer and one set of bits."""
    shape: tuple[int, ...]
    axis: int
    """The output channel axis: 0 for Linear, Conv, Embedding and RNNs, 1 for ConvTranspose and ``x @ weight``."""
    dtype: torch.dtype = torch.float32
    group_size: GroupSize = "channel"
    """Weights that share a number of bits: a block length along the input axis, "channel" or "tensor"."""
    range_size: GroupSize = "channel"
    """Weights that share a range, in the same terms."""
    grid: Grid = "affine"
    scale_dtype: torch.dtype = torch.float32
    """float16 where scales, and offsets of the float grid, are values of that and are kept so; else float32 or better."""
    width_set: int | None = field(default=None, compare=False)
    """The number of the set of weights that share one width, where it belongs to one."""
    consumer: str = ""
    """What reads the weight: a function of the graph ("linear", "conv2d") or a module that is called whole ("LSTM")."""
    bits_layout: GroupLayout = field(init=False, repr=False, compare=False)
    """The groups that share a number of bits."""
    range_layout: GroupLayout = field(init=False, repr=False, compare=False)
    """The groups that share a range."""
    scale_layout: GroupLayout = field(init=False, repr=False, compare=False)
    """The groups that share a scale: the finer of the two, since ``scale = range / (2^bits - 1)``."""

    def __post_init__(self) -> None:
        """Work out the layouts once: training asks for them at every step."""
        bits, ranges = (GroupLayout.of(self.rows, self.columns, size) for size in (self.group_size, self.range_size))
        for name, layout in (("bits_layout", bits), ("range_layout", ranges), ("scale_layout", combine(bits, ranges))):
            object.__setattr__(self, name, layout)

    @property
    def scale_bits(self) -> int:
        """What a scale or an offset takes."""
        return 16 if self.scale_dtype == torch.float16 else 32

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the weight, the first one first."""
        return (self.name, *self.aliases)

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.shape[self.axis]

    @property
    def columns(self) -> int:
        """Inputs of one output channel."""
        return self.numel // max(self.rows, 1)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class SkippedWeight:
    """A parameter that stays in float, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def first_not_finite(values: Iterable[tuple[str, Tensor]]) -> str:
    """What of these is not finite, by its name, and where; empty if all are finite everywhere."""
    return next((f"{name} {where}" for name, tensor in values if (where := not_finite(tensor))), "")


def refuse_not_finite(values: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse to go on with what training has spoilt.

    Raises:
        DivergenceError: names the first of these that is not finite, and where.
    """
    if found := first_not_finite(values):
        raise DivergenceError(f"{found}: its training diverged. Load an earlier state.")


def not_finite(tensor: Tensor) -> str:
    """Where a tensor is not finite, for a message; empty if it is finite everywhere.

    Example:
        >>> not_finite(torch.tensor([[1.0, float("nan")]]))
        'is not finite in 1 of 2 places, first at (0, 1)'
    """
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return ""
    return f"is not finite in {int(bad.sum())} of {bad.numel()} places, first at {tuple(torch.nonzero(bad)[0].tolist())}"
