"""What DiffQ does to one weight: noise while the bits are sought, true rounding in a learned range once they are final."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffq_fx import functional
from diffq_fx.functional.groups import to_rows
from diffq_fx.kernels import OnePass, RoundInRange, add_noise, learned_factor, least_error_range, normal_range, step_of_logits
from diffq_fx.methods.grid import GridQuantizer
from diffq_fx.weights import WeightSpec

if TYPE_CHECKING:
    from diffq_fx.methods.diffq import DiffQConfig
    from diffq_fx.training.compression import Compression


class DiffQWeight(GridQuantizer):
    """Pseudo quantization noise on one weight, with a trainable number of bits per group.

    Parameters:
        logits: float32, shape of the spec's ``bits_layout``; see :func:`diffq_fx.functional.bits_from_logits`.
        clip: float32, shape of the spec's ``range_layout``: how far the range has moved since the bits became final; see
            :func:`diffq_fx.kernels.RoundInRange`. None without learned clipping.

    Buffers:
        width: int32, the shape of ``logits``: the rounded bits, set for the whole model at once so that the size meets its target.
        range_low, range_high: float32, the shape of ``clip``: the range when the bits became final. None without clipping.
    """

    logits: nn.Parameter
    clip: nn.Parameter | None
    width: Tensor
    range_low: Tensor | None
    range_high: Tensor | None

    def __init__(self, spec: WeightSpec, config: "DiffQConfig", weight: Tensor) -> None:
        super().__init__(spec)
        self.config = config
        self.compression: Compression | None = None
        self.index = 0  # among the model's learned weights
        self.one_pass = OnePass(
            axis=spec.axis,
            groups=spec.bits_layout,
            ranges=spec.range_layout,
            grid=spec.grid,
            clips=config.clips,
            min_bits=config.min_bits,
            max_bits=config.max_bits,
            gain=config.bits_gain,
            gaussian=config.noise == "gaussian",
        )
        self.source = (weight,)  # in a tuple: a parameter would become one of this module's own
        bits = torch.full(spec.bits_layout.shape, float(config.init_bits), device=weight.device)
        self.logits = nn.Parameter(functional.logits_from_bits(bits, config.min_bits, config.max_bits, config.bits_gain))
        self.register_buffer("width", bits.round().to(torch.int32), persistent=False)
        unmoved = torch.zeros(spec.range_layout.shape, device=weight.device)
        self.clip = nn.Parameter(unmoved) if config.clips and config.clipping == "learned" else None
        for end in ("range_low", "range_high"):
            self.register_buffer(end, unmoved.clone() if config.clips else None)

    @property
    def frozen(self) -> bool:
        """Whether the bits are final."""
        return self.compression is not None and self.compression.frozen

    @property
    def stretch(self) -> Tensor | None:
        """What all ranges of the model are multiplied with; None where the size to hold is not the entropy-coded one."""
        return self.compression.stretch if self.compression is not None and self.config.size == "entropy" else None

    @torch.no_grad()
    def keep_bits(self) -> None:
        """Train no fraction of a bit any more: the logits say the rounded width, whatever becomes of the weights or of a copy."""
        config = self.config
        self.logits.copy_(functional.logits_from_bits(self.width.float(), config.min_bits, config.max_bits, config.bits_gain))

    def bits(self) -> Tensor:
        """Bits of each group as trained, not rounded; differentiable, shape of the spec's ``bits_layout``."""
        return functional.bits_from_logits(self.logits, self.config.min_bits, self.config.max_bits, self.config.bits_gain)

    def range_of(self, rows_OI: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Range that the grid covers: kept since the bits became final; before, the one with the least error at this width."""
        if not self.config.clips:
            low, high = super().range_of(rows_OI, bits)
            return (low, high) if self.stretch is None else (low * self.stretch, high * self.stretch)
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

    @property
    def can_make_again(self) -> bool:
        """What it is made of is the weight, the method's parameters and the random state alone."""
        return True

    def training_weight(self, weight: Tensor) -> Tensor:
        """``w + step(b) * n``; once the bits are final, the rounded weight with the gradient straight through."""
        if isinstance(weight, nn.Parameter) and weight is not self.source[0] and not torch.compiler.is_compiling():
            self.source = (weight,)
        return self._rounded_for_training(weight) if self.frozen else self._noisy(weight)

    def _noisy(self, weight: Tensor) -> Tensor:
        if self.one_pass.takes(weight, self.logits):
            return self.one_pass(weight, self.logits, self.clip)
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
        round_in_range = RoundInRange(axis=spec.axis, groups=spec.scale_layout, ranges=spec.range_layout)
        return round_in_range(weight, rounded, self.logits, self.clip, params.scale, high - low)

    def rounded_bits(self) -> Tensor:
        """Bits of each group as the converted model has them."""
        return self.width

    def state_key(self) -> tuple[Any, ...]:
        """Changes with the rounded bits of the model and with the learned range."""
        if self.compression is not None:
            self.compression.refresh(self)
        moved = tuple(None if each is None else each._version for each in (self.clip, self.stretch))
        return (self.width._version, self.width.data_ptr(), self.frozen, moved)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.compression is not None:
            self.compression.note_loaded()

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the model's compression as a plain attribute: it is a child of the model, not of each weight."""
        if name == "compression":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
