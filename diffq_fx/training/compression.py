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
from diffq_fx.training.coded_size import CodedSize, Place
from diffq_fx.training.groups_in_row import FlatGroups, WidthLimits
from diffq_fx.training.pressure import SizePressure
from diffq_fx.training.size import MIB_BITS, BitPackedSize, SizeMeasure, SizeOfLogits
from diffq_fx.training.state import TrainingState
from diffq_fx.weights import SkippedWeight


class Compression(TrainingState):
    """What a prepared model knows about its own compression; the model holds it as its child ``compression``."""

    def __init__(
        self,
        method: MethodChoice,
        quantizers: Sequence[WeightQuantizer],
        skipped: Sequence[SkippedWeight],
        rest: Sequence[Place] = (),
        weights: Sequence[Place] = (),
    ) -> None:
        learned = tuple(quantizer for quantizer in quantizers if isinstance(quantizer, DiffQWeight))
        super().__init__(learned[0].logits.device if learned else None)
        self.method = method
        # Tuples, since the quantizers are children of the modules whose weights they quantize.
        self.quantizers = tuple(quantizers)
        self.fixed = tuple(quantizer for quantizer in quantizers if not isinstance(quantizer, DiffQWeight))
        self.learned = learned
        self.skipped = tuple(skipped)
        self.rest, self.weights = tuple(rest), tuple(weights)  # what is not quantized; the weight of each quantizer
        self.rest_numel = sum(each.numel() for registry, name in rest if isinstance(each := registry[name], nn.Parameter))
        self.scope = ""
        self.scope_reason = ""
        self.notes: tuple[str, ...] = ()
        self.penalized = False  # whether model_size was ever part of a loss
        self.measure: SizeMeasure = BitPackedSize()
        self._groups: FlatGroups | None = None
        self._allocated_from: tuple[Any, ...] = ()
        self._is_loaded = False  # whether a state was loaded since the widths were last worked out: they are no part of it
        for index, quantizer in enumerate(self.learned):
            quantizer.compression, quantizer.index = self, index
        self.coded = CodedSize(self)
        self.pressure = SizePressure(self)
        self.pressure.start()

    def count_step(self) -> None:
        """Note an optimizer step of the bits; the one that ends the noise freezes them."""
        steps, frozen = self.progress
        self.note(steps=steps + 1)
        freeze_step = self.config.freeze_step
        if freeze_step is not None and steps + 1 >= freeze_step and not frozen:
            self.freeze()

    @torch.no_grad()
    def freeze(self) -> None:
        """Round the bits for good; from now on training rounds the weights truly."""
        if self.frozen:
            return
        self.find_weights()
        self.allocate()
        for quantizer in self.learned:
            quantizer.keep_range()
            quantizer.keep_bits()
        self.note(frozen=True)
        self._allocated_from = self._logits_key()

    def find_weights(self) -> None:
        """Take up the weights that the model has now, should they be others than those of the latest forward."""
        for quantizer, (registry, name) in zip(self.quantizers, self.weights, strict=True):
            weight = registry.get(name)
            if isinstance(quantizer, DiffQWeight) and type(weight) is nn.Parameter and weight is not quantizer.source[0]:
                quantizer.source = (weight,)

    def note_loaded(self) -> None:
        """Find everything anew: a state was loaded into the model or a part of it."""
        self._allocated_from, self._is_loaded = (), True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.note_loaded()

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
        """Size of what is not quantized, in bits: parameters, as the paper counts; or what all takes in a file, as last measured."""
        if self.learned and self.config.size == "entropy":
            return self.known.rest_bits
        return self.rest_numel * (16 if self.method.rest_dtype == "float16" else 32)

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

    def width_T(self) -> Tensor:
        """The whole widths of every group as last worked out, shape (T,)."""
        return torch.cat([quantizer.width.reshape(-1) for quantizer in self.learned])

    def size_of_logits(self) -> SizeOfLogits:
        """The size of the quantized weights as a function of the logits."""
        return SizeOfLogits(self.groups(), self.measure, self.config.bits_gain)

    def expected_bits(self) -> Tensor:
        """Differentiable size of the whole model in bits, 0-d."""
        other = self.fixed_bits() + self.rest_bits
        if not self.learned:
            return torch.tensor(float(other))
        logits, size_of = self.logits, self.size_of_logits()
        size = (size_of(logits) if torch.is_grad_enabled() else size_of.total(logits)[0].float()) + (other - self.known.bits_saved)
        if self.config.size == "entropy" and torch.is_grad_enabled():  # what is saved is measured; how it grows with the weights is not
            length = expected_code_length(self.learned)
            size = size + (length - length.detach())
        return size

    def exact_bits(self) -> int:
        """Size of the whole model in bits with the widths that eval() and convert use, and what is not quantized as it is now."""
        other = self.fixed_bits() + self.coded.rest_bits()
        if not self.learned:
            return other
        self.find_weights()
        self.allocate()
        width_T = self.width_T()
        return self.measure.exact_bits(self.groups(), width_T) - self.coded.saved_at(width_T) + other

    def budget_bits(self, *, measured: bool = False) -> int | None:
        """Target for the weights with trainable bits before entropy coding, in bits; None without a target.

        ``measured``: with what is not quantized as it is now. Training holds the size at the latest measurement; to look at the size of
        a model, which one rank alone may do, is not to make one.
        """
        if not self.learned:
            return None
        if self.config.target_mib is not None:
            rest = self.coded.rest_bits() if measured else self.rest_bits
            return int(self.config.target_mib * MIB_BITS) - rest - self.fixed_bits() + self.known.bits_saved
        if self.config.target_bits is not None:
            return int(self.config.target_bits * self.groups().num_weights) + self.known.bits_saved
        return None

    def reachable_bits(self) -> tuple[int, int]:
        """Smallest and largest exact size of the quantized weights that the limits of the widths allow, as the weights are now."""
        groups = self.groups()
        ends_T = (
            groups.by_limits(lambda own, limits, end=end: torch.full_like(own, limits.widths[end]), groups.values_T) for end in (0, -1)
        )
        low, high = (self.measure.exact_bits(groups, end_T) - self.coded.saved_at(end_T.int()) for end_T in ends_T)
        return low, high

    def _logits_key(self) -> tuple[Any, ...]:
        return tuple(_key(logits) for logits in self.logits)

    @torch.no_grad()
    def allocate(self) -> None:
        """Round the bits of all weights, within the target where there is one; does nothing if no logit has changed."""
        self.read_again()
        key = self._logits_key()
        if not self.learned or key == self._allocated_from:
            return
        if self.frozen and not self._is_loaded:  # final: an average over a training may have final widths beside logits from before
            for quantizer in self.learned:
                quantizer.keep_bits()
            self._allocated_from = self._logits_key()
            return
        self.find_weights()
        self._is_loaded = False
        groups, width_T = self.groups(), self._rounded_bits()
        for quantizer, width in zip(self.learned, groups.split(width_T), strict=True):
            if not torch.equal(quantizer.width.reshape(-1), width):
                quantizer.width.copy_(width.reshape(quantizer.width.shape))
        self._allocated_from = key

    def _rounded_bits(self) -> Tensor:
        """The whole widths of all groups, within the target where there is one, shape (T,)."""
        groups, bits_T, budget = self.groups(), self.bits_T(), self.budget_bits(measured=True)
        if budget is None or self.frozen:
            return groups.by_limits(lambda own, limits: nearest_widths(own, limits.widths), bits_T)
        return self.coded.fitted(allocate_widths(groups, bits_T, budget, self.measure), bits_T, budget)

    def refresh(self, quantizer: DiffQWeight) -> None:
        """Allocate again if the logits of this quantizer are not those of the last allocation."""
        if not self._allocated_from or self._allocated_from[quantizer.index] != _key(quantizer.logits):
            self.allocate()

    def train(self, mode: bool = True) -> "Compression":
        """Round the bits when the model goes to eval(), so that no forward has to."""
        self.read_again()
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
