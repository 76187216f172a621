"""The handle of a prepared model: its quantizers, its size, and the whole widths that eval() and convert use."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffq_fx import functional, kernels
from diffq_fx.errors import PreparationError
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.methods.diffq_weight import DiffQWeight
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.training.allocation import allocate_widths, nearest_widths
from diffq_fx.training.code_length import expected_code_length
from diffq_fx.training.entropy import bits_saved, rest_in_file
from diffq_fx.training.groups_in_row import FlatGroups, WidthLimits
from diffq_fx.training.pressure import SizePressure
from diffq_fx.training.size import MIB_BITS, BitPackedSize, SizeMeasure, SizeOfLogits
from diffq_fx.weights import SkippedWeight

_CODING_ROUNDS = 8
_CLOSE_ENOUGH = 2e-3
_LARGEST_STRETCH = 0.1
"""Bits a weight that the steps of all weights may gain or lose at once."""


class Compression(nn.Module):
    """What a prepared model knows about its own compression; the model holds it as its child ``compression``.

    Buffers:
        steps: int64, 0-d: optimizer steps that the bits have made.
        bits_frozen: bool, 0-d: whether the widths are final and training rounds truly.
        stretch: float32, 0-d: what all ranges are multiplied with where the entropy-coded size is to hold: once the widths are final
            weights train on, and the length of their code changes.
    """

    steps: Tensor
    bits_frozen: Tensor
    stretch: Tensor

    def __init__(
        self,
        method: MethodChoice,
        quantizers: Sequence[WeightQuantizer],
        skipped: Sequence[SkippedWeight],
        rest: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        super().__init__()
        self.method = method
        # Tuples, since the quantizers are children of the modules whose weights they quantize.
        self.quantizers = tuple(quantizers)
        self.fixed = tuple(quantizer for quantizer in quantizers if not isinstance(quantizer, DiffQWeight))
        self.learned = tuple(quantizer for quantizer in quantizers if isinstance(quantizer, DiffQWeight))
        self.skipped = tuple(skipped)
        self.rest = tuple(rest)  # where parameters and buffers are that are not quantized: moving a model to a device makes new buffers
        self.rest_numel = sum(getattr(module, name).numel() for module, name in rest if name in module._parameters)
        self.scope = ""
        self.scope_reason = ""
        self.notes: tuple[str, ...] = ()
        self.penalized = False  # whether model_size was ever part of a loss
        self.bits_saved = 0  # by entropy coding, where that is the size to hold
        self.measure: SizeMeasure = BitPackedSize()
        self._rest_in_file: int | None = None  # bits, found anew whenever the coding is measured
        self._groups: FlatGroups | None = None
        self._allocated_from: tuple[Any, ...] = ()
        device = self.learned[0].logits.device if self.learned else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("bits_frozen", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("stretch", torch.ones((), device=device))
        self._known: tuple[int, bool] | None = None  # the buffers as Python values, so that no step waits for a device
        for index, quantizer in enumerate(self.learned):
            quantizer.compression, quantizer.index = self, index
        self.pressure = SizePressure(self)
        self.pressure.start()

    @property
    def progress(self) -> tuple[int, bool]:
        """Steps so far, and whether the bits are final, without a device sync."""
        if self._known is None:
            self._known = int(self.steps), bool(self.bits_frozen)
        return self._known

    @property
    def frozen(self) -> bool:
        """Whether the widths are final: training rounds truly and the bits do not move."""
        return self.progress[1]

    def count_step(self) -> None:
        """Note an optimizer step of the bits; the one that ends the noise freezes them."""
        steps, frozen = self.progress
        self.steps += 1
        self._known = steps + 1, frozen
        freeze_step = self.config.freeze_step
        if freeze_step is not None and steps + 1 >= freeze_step and not frozen:
            self.freeze()

    @torch.no_grad()
    def freeze(self) -> None:
        """Round the bits for good; from now on training rounds the weights truly."""
        if self.frozen:
            return
        self.allocate()
        for quantizer in self.learned:
            quantizer.keep_range()
            quantizer.keep_bits()
        self.bits_frozen.fill_(True)
        self._known = int(self.steps), True
        self._allocated_from = self._logits_key()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}stretch", torch.ones(()))  # a state from before it was kept
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._known = None

    @property
    def config(self) -> DiffQConfig:
        """The settings of the trainable bits that the whole model shares; those of one weight are in its quantizer's config."""
        if not self.learned:
            raise PreparationError(f"no weight of this model has trainable bits: it was prepared with {self.method.name}.")
        return self.learned[0].config

    @property
    def logits(self) -> list[Tensor]:
        """The trainable logits of all weights."""
        return cast("list[Tensor]", [quantizer._parameters["logits"] for quantizer in self.learned])  # an attribute takes ten times as long

    @property
    def lambda_per_bit(self) -> Tensor | None:
        """Loss that the last bit of size is worth: the Lagrange multiplier of the latest step, 0-d; None without a target."""
        return self.pressure.lambda_per_bit

    @property
    def rest_bits(self) -> int:
        """Size of what is not quantized, in bits: parameters, as the paper counts; or what it takes in a packed file, buffers too."""
        if self.learned and self.config.size == "entropy":
            if self._rest_in_file is None:
                self._rest_in_file = rest_in_file(self._rest_tensors())
            return self._rest_in_file
        return self.rest_numel * (16 if self.method.rest_dtype == "float16" else 32)

    def _rest_tensors(self) -> list[Tensor]:
        """Parameters and buffers that are not quantized, as convert leaves them."""
        halves = self.method.rest_dtype == "float16"
        tensors = ((cast("Tensor", getattr(module, name)), name in module._parameters) for module, name in self.rest)
        return [tensor.half() if halves and is_parameter and tensor.dtype == torch.float32 else tensor for tensor, is_parameter in tensors]

    def fixed_bits(self) -> int:
        """Size of the weights whose method has no trainable bits."""
        return sum(quantizer.footprint().packed_bits for quantizer in self.fixed)

    def groups(self) -> FlatGroups:
        """The groups of all learned weights in one row, made once per device."""
        device = self.learned[0].logits.device
        if self._groups is None or self._groups.device != device:
            specs, configs = zip(*((quantizer.spec, quantizer.config) for quantizer in self.learned), strict=True)
            limits = [WidthLimits(config.min_bits, config.max_bits, config.allowed_widths) for config in configs]
            self._groups = FlatGroups(specs, device, limits=limits, in_containers=self.config.size == "container")
        return self._groups

    def bits_T(self) -> Tensor:
        """Bits of every group as trained, shape (T,)."""
        logits_T, gain = torch.cat([logits.detach().reshape(-1) for logits in self.logits]), self.config.bits_gain
        return self.groups().by_limits(lambda own, to: functional.bits_from_logits(own, to.min_bits, to.max_bits, gain), logits_T)

    def size_of_logits(self) -> SizeOfLogits:
        """The size of the quantized weights as a function of the logits."""
        return SizeOfLogits(self.groups(), self.measure, self.config.bits_gain)

    def expected_bits(self) -> Tensor:
        """Differentiable size of the whole model in bits, 0-d."""
        other = self.fixed_bits() + self.rest_bits
        if not self.learned:
            return torch.tensor(float(other))
        logits, size_of = self.logits, self.size_of_logits()
        size = (size_of(logits) if torch.is_grad_enabled() else size_of.total(logits)[0].float()) + (other - self.bits_saved)
        if self.config.size == "entropy" and torch.is_grad_enabled():  # what is saved is measured; how it grows with the weights is not
            length = expected_code_length(self.learned)
            size = size + (length - length.detach())
        return size

    def exact_bits(self) -> int:
        """Size of the whole model in bits with the widths that eval() and convert use, and what is not quantized as it is now."""
        self._rest_in_file = None
        other = self.fixed_bits() + self.rest_bits
        if not self.learned:
            return other
        self.allocate()
        width_T = torch.cat([quantizer.width.reshape(-1) for quantizer in self.learned])
        return self.measure.exact_bits(self.groups(), width_T) - self._saved_at(width_T) + other

    def _saved_at(self, width_T: Tensor) -> int:
        """What entropy coding takes off these widths with the weights as they are; 0 where that is not the size to hold."""
        return bits_saved(self.learned, self.groups().split(width_T)) if self.config.size == "entropy" else 0

    @torch.no_grad()
    def measure_coding(self) -> None:
        """Find what entropy coding saves at the bits of this moment, where that is the size to hold."""
        if not self.learned or self.config.size != "entropy":
            return
        self._rest_in_file = None
        bits_T, values_T = self.bits_T(), self.groups().values_T
        below_T = bits_T.floor().clamp(min=1)
        share = torch.dot(values_T, bits_T - below_T) / values_T.sum()  # bits are fractional: between those below and those above
        below, above = (self._saved_at(width_T.to(torch.int32)) for width_T in (below_T, below_T + 1))
        self.bits_saved = round(below + float(share) * (above - below))

    @torch.no_grad()
    def hold_coded_size(self) -> None:
        """Stretch all ranges so that the levels take the target again: steps that are 1 % longer save 0.014 bits a weight."""
        self._rest_in_file = None
        budget = self.budget_bits()
        if budget is None:
            return
        groups, width_T = self.groups(), torch.cat([quantizer.width.reshape(-1) for quantizer in self.learned])
        excess = self.measure.exact_bits(groups, width_T) - self._saved_at(width_T) - (budget - self.bits_saved)
        bits_a_weight = min(max(excess / groups.num_weights, -_LARGEST_STRETCH), _LARGEST_STRETCH)
        self.stretch.mul_(2**bits_a_weight)

    def budget_bits(self) -> int | None:
        """Target for the weights with trainable bits before entropy coding, in bits; None without a target."""
        if not self.learned:
            return None
        if self.config.target_mib is not None:
            return int(self.config.target_mib * MIB_BITS) - self.rest_bits - self.fixed_bits() + self.bits_saved
        if self.config.target_bits is not None:
            return int(self.config.target_bits * self.groups().num_weights) + self.bits_saved
        return None

    def reachable_bits(self) -> tuple[int, int]:
        """Smallest and largest exact size of the quantized weights that the limits of the widths allow."""
        groups = self.groups()
        ends_T = (
            groups.by_limits(lambda own, limits, end=end: torch.full_like(own, limits.widths[end]), groups.values_T) for end in (0, -1)
        )
        low, high = (self.measure.exact_bits(groups, end_T) for end_T in ends_T)
        return low, high

    def _logits_key(self) -> tuple[Any, ...]:
        return tuple(_key(logits) for logits in self.logits)

    @torch.no_grad()
    def allocate(self) -> None:
        """Round the bits of all weights, within the target where there is one; does nothing if no logit has changed."""
        key = self._logits_key()
        if not self.learned or key == self._allocated_from:
            return
        groups, width_T = self.groups(), self._rounded_bits()
        for quantizer, width in zip(self.learned, groups.split(width_T), strict=True):
            if not torch.equal(quantizer.width.reshape(-1), width):
                quantizer.width.copy_(width.reshape(quantizer.width.shape))
        self._allocated_from = key

    def _rounded_bits(self) -> Tensor:
        """The whole widths of all groups, within the target where there is one, shape (T,)."""
        groups, bits_T, budget = self.groups(), self.bits_T(), self.budget_bits()
        if budget is None or self.frozen:
            return groups.by_limits(lambda own, limits: nearest_widths(own, limits.widths), bits_T)
        width_T = allocate_widths(groups, bits_T, budget, self.measure)
        if self.config.size == "entropy":
            target = budget - self.bits_saved
            for _ in range(_CODING_ROUNDS):  # what coding saves depends on the widths, and the other way round
                saved = self._saved_at(width_T)
                if 0 <= target + saved - self.measure.exact_bits(groups, width_T) <= _CLOSE_ENOUGH * target:
                    break
                width_T = allocate_widths(groups, bits_T, target + saved, self.measure)
        return width_T

    def refresh(self, quantizer: DiffQWeight) -> None:
        """Allocate again if the logits of this quantizer are not those of the last allocation."""
        if not self._allocated_from or self._allocated_from[quantizer.index] != _key(quantizer.logits):
            self.allocate()

    def train(self, mode: bool = True) -> "Compression":
        """Round the bits when the model goes to eval(), so that no forward has to."""
        if self.learned and self.learned[0].logits.device.type != "meta" and (not mode or self.frozen):
            self.allocate()
        if not mode:
            kernels.release()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is made anew."""
        return {**self.__dict__, "_groups": None, "_allocated_from": ()}

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"{len(self.quantizers)} weights, {self.scope} scope"


def _key(logits: Tensor) -> tuple[int, int]:
    """Changes whenever the values do."""
    return logits.data_ptr(), logits._version
