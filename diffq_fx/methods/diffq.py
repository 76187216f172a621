"""DiffQ: the number of bits of every weight group is trained by gradient (Défossez, Adi, Synnaeve, arXiv:2104.09987).

In training a weight is ``w + step(b) * n`` with independent noise n, so that the loss is differentiable in the number of bits b
of each group: ``b = b_min + sigmoid(l) (b_max - b_min)``, l trainable. In eval() and after conversion the weight is truly rounded.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupSize
from diffq_fx.methods.base import Method, check_group
from diffq_fx.methods.diffq_weight import DiffQWeight
from diffq_fx.storage.packing import CONTAINER_BITS
from diffq_fx.weights import WeightSpec

_DEFAULT_TARGET_BITS = 4.0
_USUAL_START = 6.0
_GRIDS = ("affine", "symmetric", "float")
_NOISES = ("uniform", "gaussian")
_CLIPPINGS = ("learned", "fitted", "none")
_SIZES = ("bits", "container", "entropy")


class _NotGiven(float):
    """Four bits where there is no other aim; a 4 that the user wrote does not yield to another."""


@dataclass(frozen=True, kw_only=True)
class DiffQConfig(Method):
    """Settings of DiffQ. The defaults compress to 4 bits a weight, scales and everything else about the weights included.

    Give at most one of ``target_bits``, ``target_mib`` and ``penalty``; with ``target_bits=None`` and no other there is no
    pressure on the size but what you add to the loss yourself (``penalty * model_size(model)``).

    Several configs in one mapping of names to methods share one size. They may differ in what concerns a weight alone (groups, ranges,
    grid, noise, limits of the widths, clipping), not in the settings of ``whole_model``.

    Raises:
        ValueError: a setting is out of its range, with the value found.
        TypeError: a target, the penalty or the widths are no numbers.

    Example:
        >>> DiffQConfig(target_bits=3, group_size=8).target_bits
        3
        >>> DiffQConfig(min_bits=0)
        Traceback (most recent call last):
        ...
        ValueError: DiffQConfig: min_bits must be from 1 to 16, got 0.
    """

    target_bits: float | None = _NotGiven(_DEFAULT_TARGET_BITS)
    """Exact size of the quantized weights in bits per weight: levels, scales, zero points and the coding of the widths. By default 4."""
    target_mib: float | None = None
    """Exact size of the whole model in MiB, what is not quantized included. Takes the place of ``target_bits``."""
    penalty: float | None = None
    """The paper's lambda: loss per MiB of model size. Takes the place of ``target_bits``."""
    size: Literal["bits", "container", "entropy"] = "bits"
    """The size that the target holds: "bits" has every level at its width (the paper), "container" is what ONNX stores, "entropy" what an
    entropy-coded packed file takes (no range is clipped then: rare levels cost next to nothing)."""
    group_size: GroupSize = "channel"
    """Weights that share a number of bits: "tensor", "channel" (one output channel), or a block of this many inputs (1: each weight)."""
    range_per: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a range; "group" is the group that shares a number of bits."""
    grid: Grid = "affine"
    """"affine" (integer zero_point), "symmetric", or "float" (the paper's float minimum, which ONNX cannot hold)."""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """Uniform noise has the variance of real rounding, Gaussian (the paper's choice) three times as much."""
    min_bits: float = 1
    """Smallest width, 1 to 16; that of ``widths`` or of ONNX containers where these are asked for."""
    max_bits: float = 8
    """Largest width, 1 to 16."""
    widths: tuple[int, ...] | None = None
    """Widths that rounding may choose; None for every whole number from ``min_bits`` to ``max_bits``. With (2, 4, 8) no bit of an ONNX
    container is wasted."""
    init_bits: float | None = None
    """Width at the start where no target says it, above ``min_bits`` and at most ``max_bits``; None for 6 or the nearest between them."""
    bits_gain: float = 10
    """How much faster the bits move than a weight under the same optimizer; the paper has 1 and an optimizer of their own."""
    sensitivity_steps: int = 20
    """Optimizer steps after which the bits move, all at once, to where the gradients of the weights so far want them (with a target)."""
    clipping: Literal["learned", "fitted", "none"] = "learned"
    """Range of the grid: "none" spans all weights, "fitted" has the least squared error, "learned" starts there and is trained."""
    noise_steps: int | None = 200
    """Optimizer steps with noise; then the bits are final and training rounds truly. None: noise to the end. Without a target None."""
    training_steps: int | None = None
    """Optimizer steps that the whole training will make; if given, noise takes what ``rounding_share`` leaves, not ``noise_steps``."""
    rounding_share: float = 0.9
    """The part of ``training_steps`` with final bits and true rounding, 0 to 1; the first step always has noise."""

    whole_model: ClassVar[tuple[str, ...]] = (
        *("target_bits", "target_mib", "penalty", "size", "bits_gain"),
        *("sensitivity_steps", "noise_steps", "training_steps", "rounding_share"),
    )

    @staticmethod
    def paper(penalty: float | None = 5.0, group_size: int = 8) -> "DiffQConfig":
        """The paper's settings: lambda, groups of 8, Gaussian noise, per-tensor float ranges, 2 to 15 bits from 8.

        Args:
            penalty: lambda, in loss per MiB; None to add it to the loss yourself.
            group_size: weights that share a number of bits.

        Returns:
            A config; its models do not export to ONNX (the float grid has no integer zero_point).

        Example:
            >>> DiffQConfig.paper().grid
            'float'
        """
        return DiffQConfig(
            target_bits=None,
            penalty=penalty,
            group_size=group_size,
            range_per="tensor",
            grid="float",
            noise="gaussian",
            min_bits=2,
            max_bits=15,
            init_bits=8,
            bits_gain=1,
            clipping="none",
            noise_steps=None,
            min_size=2622,  # 0.01 MiB of float32
        )

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the setting and the value."""
        if isinstance(self.target_bits, _NotGiven):
            aimless = self.target_mib is None and self.penalty is None
            object.__setattr__(self, "target_bits", _DEFAULT_TARGET_BITS if aimless else None)
        aims = {k: v for k in ("target_bits", "target_mib", "penalty") if (v := getattr(self, k)) is not None}
        if len(aims) > 1:
            raise ValueError(f"DiffQConfig: give one of target_bits, target_mib and penalty, got {aims}.")
        for name, value in aims.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"DiffQConfig: {name} must be a number, got {value!r}.")
            if not 0 < value < math.inf:
                raise ValueError(f"DiffQConfig: {name} must be positive and finite, got {value}.")
        if self.widths is not None and not (isinstance(self.widths, list | tuple) and all(type(width) is int for width in self.widths)):
            raise TypeError(f"DiffQConfig: widths must be a tuple of whole numbers like (2, 4, 8), got {self.widths!r}.")
        self._check_limits()
        self._check_groups()
        self._check_widths()
        self._check_phases()
        for name, allowed in (("grid", _GRIDS), ("noise", _NOISES), ("clipping", _CLIPPINGS), ("size", _SIZES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DiffQConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if not self.bits_gain > 0:
            raise ValueError(f"DiffQConfig: bits_gain must be positive, got {self.bits_gain}.")
        self.check_common()
        if self.widths is not None or self.size == "container":  # no noise of widths that rounding cannot choose
            object.__setattr__(self, "min_bits", max(self.min_bits, min(self.allowed_widths[0], self.start_bits - 1)))

    def _check_limits(self) -> None:
        limits = {name: bits for name in ("min_bits", "init_bits", "max_bits") if (bits := getattr(self, name)) is not None}
        for name, bits in limits.items():
            if not 1 <= bits <= 16:
                raise ValueError(f"DiffQConfig: {name} must be from 1 to 16, got {bits}.")
        if self.min_bits >= min(self.init_bits or 16, self.max_bits) or (self.init_bits or 1) > self.max_bits:
            order = " < ".join(limits).replace("init_bits <", "init_bits <=")
            raise ValueError(f"DiffQConfig: expected {order}, got {', '.join(str(bits) for bits in limits.values())}.")

    @property
    def start_bits(self) -> float:
        """Width at the start where no target says it."""
        if self.init_bits is not None:
            return float(self.init_bits)
        usual = min(_USUAL_START, float(self.max_bits))
        return usual if usual > self.min_bits else (self.min_bits + self.max_bits) / 2

    def _check_groups(self) -> None:
        check_group("DiffQConfig", "group_size", self.group_size)
        if self.range_per not in ("tensor", "channel", "group"):
            raise ValueError(f'DiffQConfig: range_per must be "tensor", "channel" or "group", got {self.range_per!r}.')
        if self.range_per == "group" and self.group_size == 1:
            raise ValueError('DiffQConfig: range_per="group" with group_size=1 would store a range for every weight; use "channel".')
        if self.size == "container" and not isinstance(self.group_size, str):
            raise ValueError(
                f'DiffQConfig: size="container" needs group_size="channel" or "tensor", got {self.group_size}: '
                "ONNX holds all blocks of a channel in one container."
            )

    def _check_phases(self) -> None:
        for name, least, none_too in (("training_steps", 1, True), ("noise_steps", 1, True), ("sensitivity_steps", 0, False)):
            steps = getattr(self, name)
            if steps is None and none_too:
                continue
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
                also = ", or None" if none_too else ""
                raise ValueError(f"DiffQConfig: {name} must be a whole number of at least {least}{also}, got {steps!r}.")
        if not 0 <= self.rounding_share <= 1:
            raise ValueError(f"DiffQConfig: rounding_share must be from 0 to 1, got {self.rounding_share!r}.")

    @property
    def has_target(self) -> bool:
        """Whether there is a size to meet."""
        return self.target_bits is not None or self.target_mib is not None

    @property
    def freeze_step(self) -> int | None:
        """The optimizer step after which the bits are final; None where nothing says when."""
        if self.training_steps is not None:
            return max(round(self.training_steps * (1 - self.rounding_share)), 1)  # the bits move before they are final
        return self.noise_steps if self.has_target else None

    @property
    def sensitivity_step(self) -> int | None:
        """The optimizer step after which the bits move to where the gradients want them; None for never."""
        if not self.has_target or not self.sensitivity_steps:
            return None
        return self.sensitivity_steps if self.freeze_step is None else min(self.sensitivity_steps, self.freeze_step)

    def _check_widths(self) -> None:
        allowed = self.allowed_widths
        if len(allowed) < 2 or list(allowed) != sorted(set(allowed)):
            raise ValueError(f"DiffQConfig: widths must be two or more, rising, got {allowed}.")
        if self.size == "container" and not set(allowed) <= set(CONTAINER_BITS):
            raise ValueError(f'DiffQConfig: size="container" has widths of {CONTAINER_BITS} alone, got {allowed}.')
        if allowed[0] < self.min_bits or allowed[-1] > self.max_bits:
            raise ValueError(
                f"DiffQConfig: widths must lie within min_bits={self.min_bits:g} and max_bits={self.max_bits:g}, got {allowed}."
            )

    @property
    def allowed_widths(self) -> tuple[int, ...]:
        """The widths that rounding may choose, rising."""
        if self.widths is not None:
            return tuple(self.widths)
        every = range(math.ceil(self.min_bits), math.floor(self.max_bits) + 1)
        return tuple(width for width in every if self.size != "container" or width in CONTAINER_BITS)

    @property
    def clips(self) -> bool:
        """Whether ranges may leave weights outside."""
        return self.clipping != "none" and self.size != "entropy"

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """``(group_size, range_size, grid)``."""
        return self.group_size, self.group_size if self.range_per == "group" else self.range_per, self.grid

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "DiffQWeight":
        """Make the noise node of one weight."""
        return DiffQWeight(spec, self, weight)
