"""The handle of a prepared model: its quantizers, its size, and the whole widths that eval() and convert use."""

import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffq_fx import kernels
from diffq_fx.budget.allocation import allocate_coded_widths, allocate_widths, nearest_widths
from diffq_fx.budget.bit_state import BitState
from diffq_fx.budget.code_length import expected_code_length
from diffq_fx.budget.coded_levels import CodedLevels
from diffq_fx.budget.entropy import bits_saved, rest_in_file
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.budget.pressure import same_bits, worth_of_a_bit
from diffq_fx.budget.sensitivity import asked_on_average
from diffq_fx.budget.size import MIB_BITS, exact_bits, expected_bits, size_and_growth
from diffq_fx.errors import PreparationError
from diffq_fx.functional.precision import widest_float
from diffq_fx.kernels.checksum import device_checksum
from diffq_fx.methods import predicted_loss
from diffq_fx.methods.base import Place, WeightQuantizer
from diffq_fx.methods.diffq import DiffQWeight
from diffq_fx.methods.diffq_settings import DiffQSettings
from diffq_fx.methods.history import History
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.methods.training_state import SURELY, TrainingState
from diffq_fx.parts import CHILD, parts_of
from diffq_fx.sharded import gathered, refuse_flat, whole, wholes
from diffq_fx.storage.packing import in_smallest_type, tables_once
from diffq_fx.weights import SkippedWeight, refuse_not_finite

live: "weakref.WeakSet[Compression]" = weakref.WeakSet()
"""The compressions of all models in this process: optimizers know none of them."""

_allocating = threading.RLock()
_LEARNED = "learned"
_LOADED = "above the target: they were final in the state that was loaded, which had another one"
_UNIFORM = "the same in all groups, as far as the size allows: the learned ones cost more loss, by the first steps or the held-out batches"


class Compression(TrainingState):
    """What a prepared model knows about its own compression; the model holds it as its child ``compression``.

    Example:
        >>> from diffq_fx import DiffQConfig, prepare_diffq
        >>> prepared = prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64), DiffQConfig(target_bits=5))
        >>> prepared.compression.budget_bits(), prepared.compression.frozen
        (20480, False)

    Buffers:
        pressure_sums: float64 where the device has it, (weights, 6): :func:`diffq_fx.budget.pressure.gradient_sums` of the latest step of
            each optimizer, in the row of the first weight whose bits it holds. None without a target.
    """

    pressure_sums: Tensor

    def __init__(
        self, method: MethodChoice, quantizers: Sequence[WeightQuantizer], skipped: Sequence[SkippedWeight], rest: Sequence[Place] = ()
    ) -> None:
        learned = tuple(quantizer for quantizer in quantizers if isinstance(quantizer, DiffQWeight))
        super().__init__(learned[0].logits.device if learned else None)
        self.method = method
        # Tuples, since the quantizers are children of the modules whose weights they quantize.
        self.quantizers = tuple(quantizers)
        self.fixed = tuple(quantizer for quantizer in quantizers if not isinstance(quantizer, DiffQWeight))
        self.learned = learned
        self.skipped = tuple(skipped)
        self.rest = tuple(rest)  # what is not quantized
        self.rest_numel = sum(each.numel() for registry, name in rest if isinstance(each := registry[name], nn.Parameter))
        self.scope = ""
        self.scope_reason = ""
        self.notes: tuple[str, ...] = ()
        self.history = History()
        self.scales_ranges = True  # so that a coded size holds while weights train on; after compensation another scale would undo it
        self.price = 0.0  # squared steps that a bit is worth where weights are about to be rounded by their code as well
        self.penalized = False  # whether model_size was ever part of a loss
        self._groups: FlatGroups | None = None
        self._allocated: tuple[int, float] | None = None
        self._passes = 0
        device = self.steps.device
        sums = torch.zeros(len(learned), 6, dtype=widest_float(device), device=device) if learned and self.config.has_target else None
        self.register_buffer("pressure_sums", sums)
        for quantizer in self.learned:
            quantizer.shared = self
        live.add(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Compression":
        """Follow the model to another device, the sums in the widest type that it has."""
        sums = self._buffers["pressure_sums"]
        self._buffers["pressure_sums"] = None
        super()._apply(fn, recurse)
        if sums is not None:
            self._buffers["pressure_sums"] = sums.to(self.steps.device, widest_float(self.steps.device))
        return self

    @torch.no_grad()
    def freeze(self) -> None:
        """Round the bits for good; from now on training rounds the weights truly."""
        if self.frozen:
            return
        self.allocate()
        budget = self.budget_bits(measured=True)
        if budget is not None and predicted_loss.is_measured(self.learned):
            self._take_uniform_if_better(budget)
        for quantizer in self.learned:
            quantizer.keep_range()
        self.note(frozen=True, frozen_at=self.known.steps)
        self.allocate()

    @property
    def config(self) -> DiffQSettings:
        """The settings of the trainable bits that the whole model shares; those of one weight are in its quantizer's config."""
        if not self.learned:
            raise PreparationError(f"no weight of this model has trainable bits: it was prepared with {self.method.name}.")
        return self.learned[0].config

    @property
    def allocation(self) -> str:
        """Which widths became final, in words; empty before, and where there was no choice."""
        if not self.frozen or not self.learned or (budget := self.budget_bits()) is None:
            return ""
        if not self.is_coded and exact_bits(self.groups(), self.width_T()) > budget:
            return _LOADED
        return _UNIFORM if float(self.uniform_bits) > SURELY else _LEARNED

    @property
    def in_noise(self) -> bool:
        """Whether the training has begun and all of it, in an average too, is before the final bits that the settings ask for."""
        return bool(self.learned) and 0 < self.known.steps and not bool(self.bits_frozen) and self.config.freeze_step is not None

    @property
    def sensitivity(self) -> dict[str, float]:
        """Name of a weight -> the bits that the first steps showed it to need, but for a constant; empty before."""
        sums = ((quantizer.spec, quantizer.gradient_sums) for quantizer in self.learned)
        asked = {spec.name: asked_on_average(spec, own) for spec, own in sums if own is not None}
        return {name: bits for name, bits in asked.items() if bits is not None}

    @property
    def curves(self) -> dict[str, list[list[float]]]:
        """What was logged in training: name -> ``[step, value]`` of up to 256 steps."""
        return self.history.curves

    def log(self, **values: float | Tensor) -> None:
        """Keep values of this step (a loss, an accuracy) for the curves of the report; a few hundred of each, however many there are."""
        self.history.add(self.known.steps, values)

    @property
    def is_coded(self) -> bool:
        """Whether the size is that of an entropy-coded file."""
        return bool(self.learned) and self.config.size_of == "packed_file"

    @property
    def logits(self) -> list[Tensor]:
        """The trainable logits of all weights."""
        parameters = map(operator.attrgetter("_parameters"), self.learned)  # an attribute, or a call for each, takes ten times as long
        return cast("list[Tensor]", list(map(dict.get, parameters, itertools.repeat("logits"))))

    @property
    def asks_for_gradients(self) -> bool:
        """Whether any of the trainable bits does; PEFT leaves none that it wraps."""
        return any(logits.requires_grad for logits in self.logits)

    def groups(self) -> FlatGroups:
        """The groups of all learned weights in one row, made once per device."""
        device = self.learned[0].logits.device
        if self._groups is None or self._groups.device != device:
            specs, limits = zip(*((quantizer.spec, quantizer.config.limits) for quantizer in self.learned), strict=True)
            self._groups = FlatGroups(specs, device, limits=limits, in_containers=self.config.size_of == "onnx_file")
        return self._groups

    def bit_state(self) -> BitState:
        """The bits of this moment; to change them see :meth:`changing_bits`."""
        return BitState(self.groups(), wholes(self.logits))

    @contextmanager
    def changing_bits(self) -> Iterator[BitState]:
        """The bits of this moment, to be changed."""
        with gathered(self.logits) as logits:
            yield BitState(self.groups(), logits)

    def width_T(self) -> Tensor:
        """The whole widths of every group as last worked out, float32, shape (T,)."""
        return torch.cat([quantizer.width.reshape(-1) for quantizer in self.learned])

    def saved_at(self, width_T: Tensor) -> int:
        """Bits that entropy coding takes off these widths with the weights as they are, where the size is that of a coded file."""
        if not self.is_coded:
            return 0
        pairs = zip(self.learned, self.groups().split(width_T.to(torch.int32)), strict=True)
        weights = (quantizer.rounded_at(width) for quantizer, width in pairs)
        return bits_saved(CodedLevels(each, self.price).cheapest(each) if self.price else each for each in weights)

    def code_length(self, among: Sequence[DiffQWeight]) -> Tensor:
        """Expected bits of the code of some of the weights, 0-d, differentiable in them."""
        return expected_code_length((quantizer.spec, whole(quantizer.weight), quantizer.step_in_training()) for quantizer in among)

    def has_one_of(self, ids: set[int]) -> bool:
        """Whether one of these tensors, by id, is a parameter of the model: bits, weights, what is not quantized, or ranges."""
        places = (*(quantizer.place for quantizer in self.quantizers), *self.rest)
        return (
            any(id(logits) in ids for logits in self.logits)
            or any(id(registry.get(name)) in ids for registry, name in places)
            or any(id(parameter) in ids for quantizer in self.quantizers for parameter in quantizer.parameters())
        )

    @property
    def lambda_per_bit(self) -> Tensor | None:
        """Loss that the last bit of size is worth: the Lagrange multiplier of the latest step, 0-d; None without a target or a step."""
        sums = self._buffers["pressure_sums"]
        return None if sums is None or not bool(sums.any()) else worth_of_a_bit(sums.sum(0))

    @property
    def rest_bits(self) -> int:
        """Size of what is not quantized, in bits: parameters, as the paper counts; or what all takes in a file, as last measured."""
        if self.is_coded:
            return self.known.rest_bits
        return self.rest_numel * self.method.rest_width

    def rest_bits_now(self) -> int:
        """The same as of now: in training it changes, and so does what it takes in a file.

        Ranks gather statistics of their own in buffers. They must hold the same size, so in a process group buffers count as uncoded.
        """
        if not self.is_coded:
            return self.rest_bits
        tensors = [each for registry, name in self.rest if (each := registry.get(name)) is not None]
        parameters, buffers = ([each for each in tensors if isinstance(each, nn.Parameter) == kind] for kind in (True, False))
        halves = self.method.rest_dtype == "float16"
        kept = [each.half() if halves and each.dtype == torch.float32 else each for each in parameters]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return rest_in_file(kept) + sum(8 * buffer.nbytes for buffer in buffers)
        return rest_in_file([in_smallest_type(each.detach()) for each in tables_once([*kept, *buffers])])

    def fixed_bits(self) -> int:
        """Size of the weights whose method has no trainable bits."""
        return sum(quantizer.footprint().packed_bits for quantizer in self.fixed)

    def expected_bits(self) -> Tensor:
        """Differentiable size of the whole model in bits, 0-d."""
        other = self.fixed_bits() + self.rest_bits
        if not self.learned:
            return torch.tensor(float(other), dtype=torch.float32)
        self._refuse_flat()
        state = self.bit_state()
        size = (expected_bits(state) if torch.is_grad_enabled() else size_and_growth(state)[0].float()) + (other - self.known.bits_saved)
        if self.is_coded and torch.is_grad_enabled():  # what is saved is measured; how it grows with the weights is not
            length = self.code_length(self.learned)
            size = size + (length - length.detach())
        return size

    def exact_bits(self) -> int:
        """Size of the whole model in bits with the widths that eval() and convert use, and what is not quantized as it is now."""
        other = self.fixed_bits() + self.rest_bits_now()
        if not self.learned:
            return other
        for quantizer in self.learned if self.is_coded else ():
            quantizer.refuse_not_finite(quantizer.weight)
        self.allocate()
        width_T = self.width_T()
        return exact_bits(self.groups(), width_T) - self.saved_at(width_T) + other

    def budget_bits(self, *, measured: bool = False) -> int | None:
        """Target for the weights with trainable bits before entropy coding, in bits; None without a target.

        ``measured``: with what is not quantized as it is now. Training holds the size at the latest measurement; to look at the size of
        a model, which one rank alone may do, is not to make one.
        """
        if not self.learned:
            return None
        if self.config.target_mib is not None:
            rest = self.rest_bits_now() if measured else self.rest_bits
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
        low, high = (exact_bits(groups, end_T) - self.saved_at(end_T) for end_T in ends_T)
        return low, high

    @torch.no_grad()
    def allocate(self) -> None:
        """Round the bits of all weights, within the target where there is one; does nothing if no value has changed."""
        if not self.learned or self.learned[0].width.device.type == "meta":
            return
        with _allocating:
            self._refuse_flat()
            if self._allocated is None or self._allocated != self._checksum():
                self._set_widths(self._rounded_bits())
                self._allocated = self._checksum()

    def _refuse_flat(self) -> None:
        for quantizer in self.learned:
            if (logits := quantizer._parameters.get("logits")) is None or logits.shape != quantizer.width.shape:
                refuse_flat(quantizer.spec.name)

    def _checksum(self) -> tuple[int, float]:
        weights = [quantizer.weight for quantizer in self.learned] if self.is_coded else []
        widths = [quantizer.width for quantizer in self.learned]
        return device_checksum([*wholes([*self.logits, *weights]), *widths, self.bits_frozen, self.coding]), self.price  # one for all ranks

    def _rounded_bits(self) -> Tensor:
        """The whole widths of all groups, within the target where there is one, shape (T,)."""
        if self.frozen:  # final, even beside other logits: those of an average over a training
            width_T = self.width_T().round()
            with self.changing_bits() as state:
                state.set_bits(width_T)
            return width_T
        refuse_not_finite((f"logits of weight {q.spec.name!r}", whole(q.logits)) for q in self.learned)
        groups, bits_T, budget = self.groups(), self.bit_state().bits_T(), self.budget_bits(measured=True)
        if budget is None:
            return groups.as_firsts(groups.by_limits(lambda own, limits: nearest_widths(own, limits.widths), bits_T))
        return self._widths_within(lambda bits: allocate_widths(groups, bits_T, bits), budget)

    def _widths_within(self, allocate: Callable[[int], Tensor], budget: int) -> Tensor:
        """The widths that ``allocate`` gives for a budget, whose size is coded where that is the size to hold."""
        if not self.is_coded:
            return allocate(budget)
        saved = self.known.bits_saved
        return allocate_coded_widths(self.groups(), allocate, budget - saved, saved, self.saved_at)

    def _take_uniform_if_better(self, budget: int) -> None:
        """Give all groups the same widths, as far as the budget allows, where that surely costs less than the widths that were found."""
        groups, width_T = self.groups(), self.width_T()
        same_T = same_bits(groups, budget)
        uniform_T = self._widths_within(lambda bits: allocate_widths(groups, same_T, bits), budget)
        if predicted_loss.surely_better(self.learned, groups, uniform_T, width_T):
            self._set_widths(uniform_T)
            self.uniform_bits.fill_(1)

    def _set_widths(self, width_T: Tensor) -> None:
        for quantizer, width in zip(self.learned, self.groups().split(width_T.to(torch.float32)), strict=True):
            if not torch.equal(quantizer.width.reshape(-1), width):
                quantizer.width.copy_(width.view_as(quantizer.width))

    def follow(self, reader: nn.Module) -> None:
        """Look at all values once in each pass over the model: before the first weight that is rounded a second time."""
        reader = cast("DiffQWeight", reader)
        if reader.widths_seen == self._passes:
            self._passes += 1
            self.allocate()
        reader.widths_seen = self._passes

    def train(self, mode: bool = True) -> "Compression":
        """Round the bits when the model goes to eval(), so that no forward has to."""
        self.look()
        if not mode or self.frozen:
            self.allocate()
        if not mode:
            kernels.release()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is made anew."""
        return {**self.__dict__, "_groups": None, "_allocated": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and let optimizers find this copy too."""
        super().__setstate__(state)
        live.add(self)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"{len(self.quantizers)} weights, {self.scope} scope"


def find_compressions(model: nn.Module) -> list[Compression]:
    """The compression of each prepared part of a model: one for a prepared model, wrapped (DDP, EMA) or not."""
    return [vars(part)[CHILD] for part in parts_of(model, Compression).values()]


def require_compressions(model: nn.Module, caller: str) -> list[Compression]:
    """The compressions of a model's prepared parts, or an error that says how to get one."""
    found = find_compressions(model)
    if not found:
        raise PreparationError(f"{caller}: the {type(model).__name__} is not prepared. Call prepare_diffq(model, example_inputs) first.")
    return found


def require_compression(model: nn.Module, caller: str) -> Compression:
    """The one compression of a model, or an error that says how to get one."""
    found = require_compressions(model, caller)
    if len(found) > 1:
        raise PreparationError(f"{caller}: the {type(model).__name__} holds {len(found)} prepared parts. Give one of them at a time.")
    return found[0]
