"""DiffQ: the number of bits of every weight group is trained by gradient (Défossez, Adi, Synnaeve, arXiv:2104.09987).

In training a weight is ``w + step(b) * n`` with independent noise n, so that the loss is differentiable in the number of bits b
of each group: ``b = b_min + sigmoid(l) (b_max - b_min)``, l trainable. In eval() and after conversion the weight is truly rounded.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffq_fx import functional
from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupSize, to_rows
from diffq_fx.kernels import add_noise, learned_factor, least_error_range, normal_range, round_in_range, step_of_logits
from diffq_fx.methods.base import Method, check_group
from diffq_fx.methods.grid import GridQuantizer
from diffq_fx.storage.packing import CONTAINER_BITS
from diffq_fx.weights import WeightSpec

if TYPE_CHECKING:
    from diffq_fx.training.compression import Compression

_DEFAULT_TARGET_BITS = float("4")  # compared by identity: a 4 that the user wrote does not yield to another target
_GRIDS = ("affine", "symmetric", "float")
_NOISES = ("uniform", "gaussian")
_CLIPPINGS = ("learned", "fitted", "none")
_SIZES = ("bits", "container", "entropy")


@dataclass(frozen=True, kw_only=True)
class DiffQConfig(Method):
    """Settings of DiffQ. The defaults compress to 4 bits a weight, scales and everything else about the weights included.

    Give at most one of ``target_bits``, ``target_mib`` and ``penalty``; with ``target_bits=None`` and no other there is no
    pressure on the size but what you add to the loss yourself (``penalty * model_size(model)``).

    Raises:
        ValueError: a setting is out of its range, with the value found.

    Example:
        >>> DiffQConfig(target_bits=3, group_size=8).target_bits
        3
        >>> DiffQConfig(min_bits=0)
        Traceback (most recent call last):
        ...
        ValueError: DiffQConfig: min_bits must be from 1 to 16, got 0.
    """

    target_bits: float | None = _DEFAULT_TARGET_BITS
    """Exact size of the quantized weights in bits per weight: levels, scales, zero points and the coding of the widths."""
    target_mib: float | None = None
    """Exact size of the whole model in MiB, what is not quantized included. Takes the place of ``target_bits``."""
    penalty: float | None = None
    """The paper's lambda: loss per MiB of model size. Takes the place of ``target_bits``."""
    size: Literal["bits", "container", "entropy"] = "bits"
    """The size that the target holds: "bits" has every level at its group's width (the paper); "container" is what ONNX stores; "entropy" is what
    the entropy-coded packed file takes, and clips no range: rare levels cost next to nothing."""
    group_size: GroupSize = "channel"
    """Weights that share a number of bits: "tensor", "channel" (one output channel), or a block of this many inputs (1: each weight)."""
    range_per: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a range; "group" is the group that shares a number of bits."""
    grid: Grid = "affine"
    """"affine" (integer zero_point), "symmetric", or "float" (the paper's float minimum, which ONNX cannot hold)."""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """Uniform noise has the variance of real rounding, Gaussian (the paper's choice) three times as much."""
    min_bits: float = 1
    """Smallest width, 1 to 16."""
    max_bits: float = 8
    """Largest width, 1 to 16."""
    widths: tuple[int, ...] | None = None
    """Widths that rounding may choose; None for every whole number from ``min_bits`` to ``max_bits``. With (2, 4, 8) no bit of an ONNX
    container is wasted."""
    init_bits: float = 6
    """Width at the start where no target says it, above ``min_bits`` and at most ``max_bits``."""
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
    rounding_share: float = 0.8
    """The part of ``training_steps`` with final bits and true rounding, 0 to 1."""

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
        if self.target_bits is _DEFAULT_TARGET_BITS and (self.target_mib is not None or self.penalty is not None):
            object.__setattr__(self, "target_bits", None)  # the default yields to what was asked for
        aims = {k: v for k in ("target_bits", "target_mib", "penalty") if (v := getattr(self, k)) is not None}
        if len(aims) > 1:
            raise ValueError(f"DiffQConfig: give one of target_bits, target_mib and penalty, got {aims}.")
        for name, value in aims.items():
            if not value > 0:
                raise ValueError(f"DiffQConfig: {name} must be positive, got {value}.")
        for name in ("min_bits", "max_bits", "init_bits"):
            if not 1 <= getattr(self, name) <= 16:
                raise ValueError(f"DiffQConfig: {name} must be from 1 to 16, got {getattr(self, name)}.")
        if self.min_bits >= self.init_bits or self.init_bits > self.max_bits:
            found = f"got {self.min_bits}, {self.init_bits}, {self.max_bits}"
            raise ValueError(f"DiffQConfig: expected min_bits < init_bits <= max_bits, {found}.")
        self._check_groups()
        self._check_widths()
        self._check_phases()
        for name, allowed in (("grid", _GRIDS), ("noise", _NOISES), ("clipping", _CLIPPINGS), ("size", _SIZES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DiffQConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if not self.bits_gain > 0:
            raise ValueError(f"DiffQConfig: bits_gain must be positive, got {self.bits_gain}.")
        self.check_common()

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
        for name, least, none_too in (("training_steps", 1, True), ("noise_steps", 0, True), ("sensitivity_steps", 0, False)):
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
            return round(self.training_steps * (1 - self.rounding_share))
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


class DiffQWeight(GridQuantizer):
    """Pseudo quantization noise on one weight, with a trainable number of bits per group.

    Parameters:
        logits: float32, shape of the spec's ``bits_layout``; see :func:`diffq_fx.functional.bits_from_logits`.
        clip: float32, shape of the spec's ``range_layout``: how far the range has moved since the bits became final; see
            :func:`diffq_fx.kernels.round_in_range`. None without learned clipping.

    Buffers:
        width: int32, the shape of ``logits``: the rounded bits, set for the whole model at once so that the size meets its target.
        range_low, range_high: float32, the shape of ``clip``: the range when the bits became final. None without clipping.
    """

    logits: nn.Parameter
    clip: nn.Parameter | None
    width: Tensor
    range_low: Tensor | None
    range_high: Tensor | None

    def __init__(self, spec: WeightSpec, config: DiffQConfig, weight: Tensor) -> None:
        super().__init__(spec)
        self.config = config
        self.compression: Compression | None = None
        self.index = 0  # among the model's learned weights
        self.source = (weight,)  # in a tuple: a parameter would become one of this module's own
        bits = torch.full(spec.bits_layout.shape, float(config.init_bits), device=weight.device)
        self.logits = nn.Parameter(functional.logits_from_bits(bits, config.min_bits, config.max_bits, config.bits_gain))
        self.register_buffer("width", bits.round().to(torch.int32), persistent=False)
        unmoved = torch.zeros(spec.range_layout.shape, device=weight.device)
        self.clip = nn.Parameter(unmoved) if config.clips and config.clipping == "learned" else None
        for end in ("range_low", "range_high"):
            self.register_buffer(end, unmoved.clone() if config.clips else None)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained beside the weight."""
        return [self.logits] if self.clip is None else [self.logits, self.clip]

    @property
    def frozen(self) -> bool:
        """Whether the bits are final."""
        return self.compression is not None and self.compression.frozen

    def bits(self) -> Tensor:
        """Bits of each group as trained, not rounded; differentiable, shape of the spec's ``bits_layout``."""
        return functional.bits_from_logits(self.logits, self.config.min_bits, self.config.max_bits, self.config.bits_gain)

    def range_of(self, rows_OI: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Range that the grid covers: kept since the bits became final; before, the one with the least error at this width."""
        if not self.config.clips:
            return super().range_of(rows_OI, bits)
        if self.frozen:
            moved = 1.0 if self.clip is None else learned_factor(self.clip.detach())
            return self.get_buffer("range_low") * moved, self.get_buffer("range_high") * moved
        return least_error_range(rows_OI, self.spec.range_layout, bits, self.spec.scale_layout, self.spec.grid)

    @torch.no_grad()
    def keep_range(self) -> None:
        """Fix the range from which clipping is learned; for when the bits become final."""
        if self.config.clips:
            low, high = self.range_of(to_rows(self.source[0], self.spec.axis), self.width)
            self.get_buffer("range_low").copy_(low)
            self.get_buffer("range_high").copy_(high)

    def training_weight(self, weight: Tensor) -> Tensor:
        """``w + step(b) * n``; once the bits are final, the rounded weight with the gradient straight through."""
        if isinstance(weight, nn.Parameter) and weight is not self.source[0] and not torch.compiler.is_compiling():
            self.source = (weight,)
        return self._rounded_for_training(weight) if self.frozen else self._noisy(weight)

    def _noisy(self, weight: Tensor) -> Tensor:
        spec, config = self.spec, self.config
        limits = {"min_bits": config.min_bits, "max_bits": config.max_bits, "gain": config.bits_gain}
        step = step_of_logits(self.logits, self.span_in_training(weight), unmoved=self.clip, **limits)
        return add_noise(weight, step, axis=spec.axis, block=spec.scale_layout.block, gaussian=config.noise == "gaussian")

    def span_in_training(self, weight: Tensor) -> Tensor:
        """The length of the range that the steps of the noise divide, shape of the spec's ``range_layout``."""
        spec, rows_OI = self.spec, to_rows(weight, self.spec.axis)
        if not self.config.clips:
            low, high = super().range_of(rows_OI, self.width)
        else:
            low, high = normal_range(rows_OI, spec.range_layout, self._widest_bits(), spec.grid)
        return high - low

    @torch.no_grad()
    def _widest_bits(self) -> Tensor:
        """The most bits among the groups of each range."""
        widest = self.logits
        for axis, size in enumerate(self.spec.range_layout.shape):
            if size == 1 < widest.shape[axis]:
                widest = widest.amax(axis, keepdim=True)
        return functional.bits_from_logits(widest, self.config.min_bits, self.config.max_bits, self.config.bits_gain)

    def _rounded_for_training(self, weight: Tensor) -> Tensor:
        if self.compression is not None and not torch.compiler.is_compiling():
            self.compression.refresh(self)
        spec = self.spec
        low, high = self.range_of(to_rows(weight, spec.axis), self.width)
        params = functional.quant_params(low, high, self.width, spec.grid)
        rounded = self.round_to(weight.detach(), params)
        layouts = {"axis": spec.axis, "groups": spec.scale_layout, "ranges": spec.range_layout}
        return round_in_range(weight, rounded, self.logits, self.clip, params.scale, high - low, **layouts)

    def rounded_bits(self) -> Tensor:
        """Bits of each group as the converted model has them."""
        return self.width

    def state_key(self) -> tuple[Any, ...]:
        """Changes with the rounded bits of the model and with the learned range."""
        if self.compression is not None:
            self.compression.refresh(self)
        return (self.width._version, self.width.data_ptr(), self.frozen, 0 if self.clip is None else self.clip._version)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the model's compression as a plain attribute: it is a child of the model, not of each weight."""
        if name == "compression":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
