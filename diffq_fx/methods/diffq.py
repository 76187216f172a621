"""DiffQ: the number of bits of every weight group is trained by gradient (Défossez, Adi, Synnaeve, arXiv:2104.09987).

In training a weight is ``w + step(b) * n`` with independent noise n, so that the loss is differentiable in the number of bits b
of each group: ``b = b_min + sigmoid(l) (b_max - b_min)``, l trainable. In eval() and after conversion the weight is truly rounded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import functional
from diffq_fx.budget.bit_state import GAIN
from diffq_fx.budget.entropy import RoundedWeight
from diffq_fx.errors import PreparationError
from diffq_fx.functional.groups import GroupSize, to_rows
from diffq_fx.kernels import Noise, RoundInRange, learned_factor, least_error_range
from diffq_fx.methods.base import SUMS
from diffq_fx.methods.diffq_settings import DiffQSettings
from diffq_fx.methods.grid import GridQuantizer
from diffq_fx.methods.training_state import TrainingState
from diffq_fx.runtimes import RUNTIMES, reason_against, runtime_named
from diffq_fx.sharded import whole
from diffq_fx.weights import WeightSpec


@dataclass(frozen=True, kw_only=True)
class DiffQConfig(DiffQSettings):
    """Settings of DiffQ. The defaults compress to 4 bits a weight, scales and everything else about the weights included.

    Give at most one of ``target_bits``, ``target_mib`` and ``penalty``; with ``target_bits=None`` and no other there is no
    pressure on the size but what you add to the loss yourself (``penalty * model_size(model)``).

    Several configs in one mapping of names to methods share one size. They may differ in what concerns a weight alone (groups, ranges,
    grid, noise, limits of the widths), not in the settings of ``whole_model``.

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

    @staticmethod
    def paper(penalty: float | None = 5.0, group_size: GroupSize = 8, **settings: Any) -> "DiffQConfig":
        """The paper's settings: lambda, groups of 8, Gaussian noise, per-tensor float ranges, 2 to 15 bits from 8.

        Differs from the paper: bits move ten times as fast at the same rate (give them a tenth of the paper's with
        :func:`~diffq_fx.setup_optimizer`); the range is a constant of the step, so no gradient goes through it to the extreme weights;
        noise has 128 values, quantiles of the Gaussian up to 1.34 steps; no group straddles two output channels; the widths of a weight are
        coded relative to its smallest one.

        Args:
            penalty: lambda, in loss per MiB; None to add it to the loss yourself.
            group_size: weights that share a number of bits.
            **settings: other settings, such as ``min_bits``, or in place of the paper's.

        Returns:
            A config; its models do not export to ONNX (the float grid has no integer zero_point).

        Example:
            >>> DiffQConfig.paper().grid
            'float'
        """
        preset = {
            "target_bits": None,
            "range_per": "tensor",
            "grid": "float",
            "noise": "gaussian",
            "min_bits": 2,
            "max_bits": 15,
            "init_bits": 8,
            "clip_ranges": False,
            "min_size": 2622,  # 0.01 MiB of float32
        }
        return DiffQConfig(**{**preset, "penalty": penalty, "group_size": group_size, **settings})

    @staticmethod
    def for_runtime(runtime: str, **settings: Any) -> "DiffQConfig":
        """Settings whose weights a runtime holds as they are learned, without a second rounding: one width a weight and block scales.

        Args:
            runtime: "onnxruntime", "web", "openvino", "onnxruntime-genai" or "gguf".
            **settings: other settings, such as a target, or of the preset: ``widths``, ``range_per``, ``grid``, ... Without a target it is
                4 bits a weight, or where the narrowest width is 4, 5 ("gguf") or 5.5 (its float grid, "openvino").

        Returns:
            A config; it refuses what the runtime cannot hold, and so do configs made of it with :func:`dataclasses.replace`.

        Raises:
            ValueError: the runtime is unknown, has one width alone, or cannot hold what the settings ask for.
            TypeError: there is no such setting.

        Example:
            >>> config = DiffQConfig.for_runtime("gguf", target_bits=5)
            >>> config.widths, config.range_per, config.grid, config.scale_dtype
            ((4, 5, 8), 32, 'symmetric', 'float16')
            >>> DiffQConfig.for_runtime("gguf", widths=(3, 4))
            Traceback (most recent call last):
            ...
            ValueError: DiffQConfig: the runtime 'gguf' has widths of (4, 5, 8) on the symmetric grid, got (3, 4).
        """
        preset = runtime_named(runtime).preset(settings.get("grid"))
        target = RUNTIMES[runtime].default_target(preset["grid"])
        if target is not None and settings.keys().isdisjoint(("target_bits", "target_mib", "penalty")):
            preset["target_bits"] = target
        if len(preset["widths"]) == 1:
            (bits,) = preset["widths"]
            raise ValueError(f"DiffQConfig: the runtime {runtime!r} has {bits} bits alone and no width to learn. Use STE(bits={bits}).")
        return DiffQConfig(**{**preset, "runtime": runtime, **settings})

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "DiffQWeight":
        """Make the noise node of one weight."""
        if self.runtime is not None and (reason := reason_against(self.runtime, spec)):
            raise PreparationError(f"weight {spec.name!r} of shape {spec.shape}: {reason}.")
        return DiffQWeight(spec, self, weight)


class DiffQWeight(GridQuantizer):
    """Noise on one weight while its bits are sought, true rounding in a learned range once they are final.

    Parameters:
        logits: float32, shape of the spec's ``bits_layout``; see :func:`diffq_fx.functional.bits_from_logits`.
        clip: float32, shape of the spec's ``range_layout``: how far the range has moved since the bits became final; see
            :func:`diffq_fx.kernels.RoundInRange`. None without clipping.

    Buffers:
        width: float32, whose average does no harm, the shape of ``logits``: the rounded bits, set for the whole model at once so that the
            size meets its target.
        range_low, range_high: float32, the shape of ``clip``: the range when the bits became final. None without clipping.
        importance: float32, shape (I,), the columns of the weight's rows: how much their squared errors count where the range is sought,
            zeros while that is not known. None without clipping.
        gradient_sums: float32, (4, *shape of ``logits``): what :mod:`diffq_fx.budget.sensitivity` has gathered. None without a target.
    """

    logits: nn.Parameter
    clip: nn.Parameter | None
    width: Tensor
    range_low: Tensor | None
    range_high: Tensor | None
    importance: Tensor | None
    gradient_sums: Tensor | None
    shared: TrainingState | None
    """What the model's weights have in common; a child of the model and not of each weight."""

    def __init__(self, spec: WeightSpec, config: DiffQSettings, weight: Tensor) -> None:
        super().__init__(spec)
        self.config = config
        self.shared = None
        self.widths_seen = 0  # the pass over the model in which it last asked whether the widths are those of the logits
        self._limits = {"min_bits": config.min_bits, "max_bits": config.max_bits, "gain": GAIN}
        self.noise = Noise(
            axis=spec.axis,
            groups=spec.bits_layout,
            ranges=spec.range_layout,
            grid=spec.grid,
            clips=config.clips,
            gaussian=config.noise == "gaussian",
            **self._limits,
        )
        self.round_in_range = RoundInRange(spec.axis, spec.scale_layout, spec.range_layout, spec.grid, spec.scale_dtype)
        like = {"dtype": torch.float32, "device": weight.device}
        bits = torch.full(spec.bits_layout.shape, config.start_bits, **like)
        self.logits = nn.Parameter(functional.logits_from_bits(bits, **self._limits))
        self.register_buffer("width", bits.round())
        unmoved = torch.zeros(spec.range_layout.shape, **like)
        self.clip = nn.Parameter(unmoved) if config.clips else None
        for end in ("range_low", "range_high"):
            self.register_buffer(end, unmoved.clone() if config.clips else None)
        self.register_buffer("importance", torch.zeros(spec.columns, **like) if config.clips else None)
        self.register_buffer("learned_for", torch.zeros(SUMS, **like) if config.clips else None)
        observes = config.sensitivity_step is not None
        self.register_buffer("gradient_sums", torch.zeros(4, *spec.bits_layout.shape, **like) if observes else None)

    @property
    def frozen(self) -> bool:
        """Whether the bits are final."""
        return self.shared is not None and self.shared.frozen

    @property
    def range_scale(self) -> Tensor | None:
        """What all ranges of the model are multiplied with; None where the size to hold is not that of a packed file."""
        return self.shared.range_scale if self.shared is not None and self.config.size_of == "packed_file" else None

    def bits(self) -> Tensor:
        """Bits of each group as trained, not rounded; differentiable, shape of the spec's ``bits_layout``."""
        return functional.bits_from_logits(whole(self.logits), **self._limits)

    def range_of(self, rows_OI: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Range that the grid covers: kept since the bits became final; before, the one with the least error at this width."""
        if self.clip is None:
            low, high = super().range_of(rows_OI, bits)
            return (low, high) if self.range_scale is None else (low * self.range_scale, high * self.range_scale)
        if self.frozen and not self.is_learned_for_another():
            moved = learned_factor(whole(self.clip.detach()))
            return self.get_buffer("range_low") * moved, self.get_buffer("range_high") * moved
        spec = self.spec
        steps = None if self.shared is None else self.shared.steps
        return least_error_range(rows_OI, spec.range_layout, bits, spec.scale_layout, spec.grid, self.importance, steps=steps)

    @torch.no_grad()
    def keep_range(self) -> None:
        """Fix the range from which clipping is learned; for when the bits become final."""
        if self.clip is not None:
            self.note_learned_for(self.weight, anew=True)
            low, high = self.range_of(to_rows(whole(self.weight), self.spec.axis), self.rounded_bits())
            self.get_buffer("range_low").copy_(low)
            self.get_buffer("range_high").copy_(high)

    @property
    def can_make_again(self) -> bool:
        """What it is made of is the weight, the method's parameters and the random state alone."""
        return True

    def training_weight(self, weight: Tensor) -> Tensor:
        """``w + step(b) * n``; once the bits are final, the rounded weight with the gradient straight through."""
        noted = self.shared if torch.is_grad_enabled() and not torch.compiler.is_compiling() else None
        if noted is not None and self.frozen:
            self.note_learned_for(weight)
        read = self._rounded_for_training(weight) if self.frozen else self.noise(weight, self.logits, self.clip)
        if noted is not None:
            noted.was_read(self.spec.name, read)
        return read

    def span_in_training(self, weight: Tensor) -> Tensor:
        """The length of the range that the steps of the noise divide, shape of the spec's ``range_layout``."""
        return self.noise.span_and_growth(weight, whole(self.logits))[0]

    @torch.no_grad()
    def step_in_training(self) -> Tensor:
        """The step of each group at the bits of this moment, shape of the spec's ``scale_layout``."""
        return self.span_in_training(whole(self.weight)) / (torch.exp2(self.bits()) - 1)

    @torch.no_grad()
    def squared_noise(self) -> tuple[Tensor, Tensor]:
        """Expected sum of the squared noise of each group's weights, and how that of all grows with each logit, shape of ``logits``."""
        return self.noise.squared(whole(self.weight), whole(self.logits))

    def rounded_at(self, width: Tensor) -> RoundedWeight:
        """The weight and the grid that it would be rounded on with these whole widths."""
        rows_OI, width = to_rows(whole(self.weight.detach()), self.spec.axis), width.view(self.width.shape)
        return RoundedWeight(self.spec, rows_OI, width, self.params(rows_OI, width))

    def _rounded_for_training(self, weight: Tensor) -> Tensor:
        if self.clip is None:
            low, high = self.range_of(to_rows(weight, self.spec.axis), self.width)
        else:
            low, high = self.get_buffer("range_low"), self.get_buffer("range_high")
        return self.round_in_range(weight, self.logits, self.clip, low, high, self.width)

    def rounded_bits(self) -> Tensor:
        """Bits of each group as the converted model has them."""
        return self.width.round().to(torch.int32)

    def follow(self) -> None:
        """Have the widths of the logits: those of all weights, since the size is one."""
        if self.shared is not None:
            self.shared.follow(self)

    def state_tensors(self) -> tuple[Tensor, ...]:
        """The rounded bits, the range and what it is sought with."""
        shared = () if self.shared is None else (self.shared.bits_frozen, self.shared.steps)
        kept = (self.width, self.clip, self.range_low, self.range_high, self.importance, self.range_scale, self.learned_for, *shared)
        return tuple(each for each in kept if each is not None)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep what is shared as a plain attribute."""
        if name == "shared":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
