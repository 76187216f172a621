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
from diffq_fx.kernels import add_noise, step_of_logits
from diffq_fx.methods.base import Method, check_group
from diffq_fx.methods.grid import GridQuantizer
from diffq_fx.weights import WeightSpec

if TYPE_CHECKING:
    from diffq_fx.training.compression import Compression

_DEFAULT_TARGET_BITS = float("4")  # compared by identity: a 4 that the user wrote does not yield to another target
_GRIDS = ("affine", "symmetric", "float")
_NOISES = ("uniform", "gaussian")


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
    group_size: GroupSize = "channel"
    """Weights that share a number of bits: "tensor", "channel" (one output channel), or a block of this many inputs (1: each weight)."""
    range_per: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a range; "group" is the group that shares a number of bits."""
    grid: Grid = "affine"
    """"affine" (integer zero_point), "symmetric", or "float" (the paper's float minimum, which ONNX cannot hold)."""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """Uniform noise has the variance of real rounding, Gaussian (the paper's choice) three times as much."""
    min_bits: float = 2
    """Smallest width, 1 to 16."""
    max_bits: float = 8
    """Largest width, 1 to 16."""
    widths: tuple[int, ...] | None = None
    """Widths that rounding may choose; None for every whole number from ``min_bits`` to ``max_bits``. With (2, 4, 8) no bit of an ONNX
    container is wasted."""
    init_bits: float = 6
    """Width at the start, above ``min_bits`` and at most ``max_bits``."""
    bits_gain: float = 10
    """How much faster the bits move than a weight under the same optimizer; the paper has 1 and an optimizer of their own."""
    ramp_steps: int = 100
    """Optimizer steps in which the size in training goes from ``init_bits`` to the target. eval() and convert always use the target."""
    training_steps: int | None = None
    """Optimizer steps that the whole training will make. If given, the bits freeze at the end of the noise, and the last part trains with
    true rounding; else call :func:`~diffq_fx.freeze_bits` for that yourself."""
    rounding_share: float = 1 / 3
    """The part of ``training_steps`` with frozen bits and true rounding, 0 to 1."""

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
        for name, allowed in (("grid", _GRIDS), ("noise", _NOISES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DiffQConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.ramp_steps < 0 or not self.bits_gain > 0:
            raise ValueError("DiffQConfig: ramp_steps must not be negative, bits_gain must be positive.")
        self.check_common()

    def _check_groups(self) -> None:
        check_group("DiffQConfig", "group_size", self.group_size)
        if self.range_per not in ("tensor", "channel", "group"):
            raise ValueError(f'DiffQConfig: range_per must be "tensor", "channel" or "group", got {self.range_per!r}.')
        if self.range_per == "group" and self.group_size == 1:
            raise ValueError('DiffQConfig: range_per="group" with group_size=1 would store a range for every weight; use "channel".')

    def _check_phases(self) -> None:
        steps = self.training_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"DiffQConfig: training_steps must be a whole number of at least 1, or None, got {steps!r}.")
        if not 0 <= self.rounding_share <= 1:
            raise ValueError(f"DiffQConfig: rounding_share must be from 0 to 1, got {self.rounding_share!r}.")

    @property
    def freeze_step(self) -> int | None:
        """The optimizer step after which the bits freeze; None without ``training_steps``."""
        return None if self.training_steps is None else round(self.training_steps * (1 - self.rounding_share))

    @property
    def ramp_length(self) -> int:
        """``ramp_steps``, or less in a short training: half of the noise has the target's size."""
        return self.ramp_steps if self.freeze_step is None else min(self.ramp_steps, self.freeze_step // 2)

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
        return tuple(range(math.ceil(self.min_bits), math.floor(self.max_bits) + 1))

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """``(group_size, range_size, grid)``."""
        return self.group_size, self.group_size if self.range_per == "group" else self.range_per, self.grid

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "DiffQWeight":
        """Make the noise node of one weight."""
        return DiffQWeight(spec, self, weight.device)


class _FrozenBits(torch.autograd.Function):
    """The rounded weight, with the gradient straight through and none for the bits: a zero, so that DistributedDataParallel meets them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, rounded: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (logits,) = ctx.saved_tensors
        return grad, torch.zeros_like(logits), None


class DiffQWeight(GridQuantizer):
    """Pseudo quantization noise on one weight, with a trainable number of bits per group.

    Parameters:
        logits: float32, shape of the spec's ``bits_layout``; see :func:`diffq_fx.functional.bits_from_logits`.

    Buffers:
        width: int32, the same shape: the rounded bits, set for the whole model at once so that the size meets its target.
    """

    logits: nn.Parameter
    width: Tensor

    def __init__(self, spec: WeightSpec, config: DiffQConfig, device: torch.device) -> None:
        super().__init__(spec)
        self.config = config
        self.compression: Compression | None = None
        self.index = 0  # among the model's learned weights
        bits = torch.full(spec.bits_layout.shape, float(config.init_bits), device=device)
        self.logits = nn.Parameter(functional.logits_from_bits(bits, config.min_bits, config.max_bits, config.bits_gain))
        self.register_buffer("width", bits.round().to(torch.int32), persistent=False)

    def bits(self) -> Tensor:
        """Bits of each group as trained, not rounded; differentiable, shape of the spec's ``bits_layout``."""
        return functional.bits_from_logits(self.logits, self.config.min_bits, self.config.max_bits, self.config.bits_gain)

    def training_weight(self, weight: Tensor) -> Tensor:
        """``w + step(b) * n``; once the bits are frozen, the rounded weight with the gradient straight through."""
        spec = self.spec
        if self.compression is not None and self.compression.frozen:
            if not torch.compiler.is_compiling():
                self.compression.refresh(self)
            return _FrozenBits.apply(weight, self.logits, self.rounded_weight(weight.detach()))
        low, high = self.range_of(to_rows(weight, spec.axis))
        config = self.config
        step = step_of_logits(self.logits, high - low, min_bits=config.min_bits, max_bits=config.max_bits, gain=config.bits_gain)
        gaussian = config.noise == "gaussian"
        return add_noise(weight, step, axis=spec.axis, block=spec.scale_layout.block, gaussian=gaussian)

    def rounded_bits(self) -> Tensor:
        """Bits of each group as the converted model has them."""
        return self.width

    def state_key(self) -> tuple[Any, ...]:
        """Changes with the rounded bits of the model."""
        if self.compression is not None:
            self.compression.refresh(self)
        return (self.width._version, self.width.data_ptr())

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the model's compression as a plain attribute: it is a child of the model, not of each weight."""
        if name == "compression":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
