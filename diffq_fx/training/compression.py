"""The handle of a prepared model: its quantizers, its size, and how the pressure on the size reaches the bits.

The user's loop does not change, so the pressure works where every loop passes: at the optimizer's step. Torch calls a hook before
and after each step of any optimizer; by then gradients are accumulated, reduced over ranks, unscaled and clipped.

With a target, training is a constrained problem, min L(w, b) subject to M(b) = target, and is solved by projection:

- before the step, the bits' gradient ``g`` loses the part that would only change the size: ``g - lambda dM/dl`` with
  ``lambda = sum(g) / sum(dM/dl)``, the Lagrange multiplier. It has the scale of the loss whatever that is.
- after the step, all logits of the model are shifted together so that the size is what it should be.

So the size is met from the first step on, and what the optimizer learns is where the bits go. With a penalty (the paper's
lambda) the hook adds ``penalty * dM/dl`` once per step.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.methods.diffq import DiffQConfig, DiffQWeight
from diffq_fx.training.size import MIB_BITS, BitPackedSize, FlatGroups, SizeMeasure, allocate_widths, mib, widths_limits
from diffq_fx.weights import SkippedWeight

_GRADIENT_RMS = 1e-3
"""The bits' gradient is brought to this size, so that a plain SGD moves them as an Adam would, whatever the scale of the loss."""

_LOGIT_LIMIT = 6.0
"""``|gain * logit|`` stays below this: further out the sigmoid's slope is too small for a group ever to come back."""

_LARGEST_SHIFT = 0.5
"""Largest common shift of ``gain * logit`` in one step."""


@dataclass
class _GradientSums:
    """Sums over the groups of one optimizer that the multiplier and the scale need; g gradient, n = dM/dl."""

    g: Tensor
    n: Tensor
    gg: Tensor
    gn: Tensor
    nn: Tensor
    count: int


class Compression(nn.Module):
    """What a prepared model knows about its own compression; the model holds it as its child ``compression``.

    Buffers:
        steps: int64, 0-d: optimizer steps that the bits have made.
    """

    steps: Tensor

    def __init__(
        self, method: Any, quantizers: Sequence[WeightQuantizer], skipped: Sequence[SkippedWeight], rest_numel: int
    ) -> None:
        super().__init__()
        self.method = method
        # Tuples, since the quantizers are children of the modules whose weights they quantize.
        self.quantizers = tuple(quantizers)
        self.learned = tuple(quantizer for quantizer in quantizers if isinstance(quantizer, DiffQWeight))
        self.skipped = tuple(skipped)
        self.rest_numel = rest_numel
        self.scope = ""
        self.scope_reason = ""
        self.notes: tuple[str, ...] = ()
        self.penalized = False  # whether model_size was ever part of a loss
        self.lambda_per_bit: Tensor | None = None
        """Loss that the last bit of size is worth: the Lagrange multiplier of the latest step, 0-d."""
        self.measure: SizeMeasure = BitPackedSize()
        self._groups: FlatGroups | None = None
        self._sums: weakref.WeakKeyDictionary[Optimizer, _GradientSums] = weakref.WeakKeyDictionary()
        self._slope: list[Tensor] | None = None
        self._allocated_from: tuple[Any, ...] = ()
        device = self.quantizers[0].logits.device if self.learned else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        for index, quantizer in enumerate(self.learned):
            quantizer.compression, quantizer.index = self, index
        _watch(self)

    @property
    def config(self) -> DiffQConfig:
        """The settings."""
        return self.method

    # Size

    @property
    def rest_bits(self) -> int:
        """Size of what is not quantized, in bits."""
        return self.rest_numel * (16 if self.config.rest_dtype == "float16" else 32)

    def groups(self) -> FlatGroups:
        """The groups of all learned weights in one row, made once per device."""
        device = self.learned[0].logits.device
        if self._groups is None or self._groups.values_T.device != device:
            self._groups = FlatGroups([quantizer.spec for quantizer in self.learned], device)
        return self._groups

    def bits_T(self) -> Tensor:
        """Bits of every group as trained, differentiable, shape (T,)."""
        logits_T = torch.cat([quantizer.logits.reshape(-1) for quantizer in self.learned])
        config = self.config
        return config.min_bits + torch.sigmoid(logits_T * config.bits_gain) * (config.max_bits - config.min_bits)

    def expected_bits(self) -> Tensor:
        """Differentiable size of the whole model in bits, 0-d."""
        return self.measure.expected_bits(self.groups(), self.bits_T()) + self.rest_bits

    def exact_bits(self) -> int:
        """Size of the whole model in bits with the widths that eval() and convert use."""
        self.allocate()
        width_T = torch.cat([quantizer.width.reshape(-1) for quantizer in self.learned])
        return self.measure.exact_bits(self.groups(), width_T) + self.rest_bits

    def budget_bits(self) -> int | None:
        """Target for the quantized weights in bits, None without a target."""
        if self.config.target_mib is not None:
            return int(self.config.target_mib * MIB_BITS) - self.rest_bits
        if self.config.target_bits is not None:
            return int(self.config.target_bits * self.groups().num_weights)
        return None

    def reachable_bits(self) -> tuple[int, int]:
        """Smallest and largest exact size of the quantized weights that the limits of the widths allow."""
        groups = self.groups()
        sizes = [self.measure.exact_bits(groups, torch.full_like(groups.values_T, w)) for w in self._limits()]
        return sizes[0], sizes[1]

    def _limits(self) -> tuple[int, int]:
        return widths_limits(self.config.min_bits, self.config.max_bits)

    # Rounded widths

    def _logits_key(self) -> tuple[Any, ...]:
        return tuple((q.logits.data_ptr(), q.logits._version) for q in self.learned)  # noqa: SLF001

    @torch.no_grad()
    def allocate(self) -> None:
        """Round the bits of all weights, within the target where there is one; does nothing if no logit has changed."""
        key = self._logits_key()
        if key == self._allocated_from:
            return
        groups, bits_T, budget = self.groups(), self.bits_T(), self.budget_bits()
        width_T = bits_T.round().to(torch.int32) if budget is None else allocate_widths(groups, bits_T, self._limits(), budget, self.measure)
        for quantizer, width in zip(self.learned, groups.split(width_T), strict=True):
            if not torch.equal(quantizer.width.reshape(-1), width):
                quantizer.width.copy_(width.reshape(quantizer.width.shape))
        self._allocated_from = key

    def refresh(self, quantizer: DiffQWeight) -> None:
        """Allocate again if the logits of this quantizer are not those of the last allocation."""
        index = quantizer.index
        now = (quantizer.logits.data_ptr(), quantizer.logits._version)  # noqa: SLF001
        if not self._allocated_from or self._allocated_from[index] != now:
            self.allocate()

    def train(self, mode: bool = True) -> "Compression":
        """Round the bits when the model goes to eval(), so that no forward has to."""
        if not mode and self.learned and self.learned[0].logits.device.type != "meta":
            self.allocate()
        return super().train(mode)

    # Pressure

    def _pressed(self) -> bool:
        config = self.config
        return config.target_bits is not None or config.target_mib is not None or config.penalty is not None

    def _budget_now(self) -> Tensor | None:
        """The size to hold in training: from that of ``init_bits`` to the target in ``ramp_steps`` steps, 0-d."""
        budget = self.budget_bits()
        if budget is None:
            return None
        groups = self.groups()
        start = self.config.init_bits * groups.values_T.sum() + groups.fixed_bits
        share = ((self.steps + 1) / max(self.config.ramp_steps, 1)).clamp(max=1)
        return start + (budget - start) * share

    def _size_and_slope(self) -> tuple[Tensor, list[Tensor]]:
        """Size of the quantized weights in bits and its gradient for each logit."""
        logits = [quantizer.logits for quantizer in self.learned]
        with torch.enable_grad():
            size = self.measure.expected_bits(self.groups(), self.bits_T())
        return size.detach(), list(torch.autograd.grad(size, logits))

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, held: Sequence[int]) -> None:
        """Project the bits' gradients, or add the penalty's, just before ``optimizer`` uses them."""
        if not self._pressed():
            return
        if self._slope is None:
            _, self._slope = self._size_and_slope()
        pairs = [(q.logits, self._slope[i]) for i in held if (q := self.learned[i]).logits.grad is not None]
        if not pairs:
            return
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by GradScaler's scale only later
        scale = 1.0 if scale is None else scale
        if self.config.penalty is not None:
            for logits, slope in pairs:
                logits.grad.add_(slope * (scale * self.config.penalty / MIB_BITS))
            return
        multiplier, factor = self._multiplier_and_factor(optimizer, pairs, scale)
        self.lambda_per_bit = -multiplier
        for logits, slope in pairs:
            logits.grad.sub_(multiplier * scale * slope).mul_(factor)

    def _multiplier_and_factor(
        self, optimizer: Optimizer, pairs: Sequence[tuple[Tensor, Tensor]], scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The Lagrange multiplier over all optimizers that hold bits, and what brings the projected gradient to its size."""
        g = torch.cat([logits.grad.reshape(-1) for logits, _ in pairs]).double() / scale
        n = torch.cat([slope.reshape(-1) for _, slope in pairs]).double()
        self._sums[optimizer] = _GradientSums(g.sum(), n.sum(), (g * g).sum(), (g * n).sum(), (n * n).sum(), g.numel())
        sums = list(self._sums.values())
        multiplier = sum(s.g for s in sums) / sum(s.n for s in sums).clamp(min=1e-30)
        square = sum(s.gg - 2 * multiplier * s.gn + multiplier**2 * s.nn for s in sums) / sum(s.count for s in sums)
        return multiplier.float(), (_GRADIENT_RMS / square.clamp(min=0).sqrt().clamp(min=1e-30)).float()

    @torch.no_grad()
    def after_step(self, held: Sequence[int]) -> None:
        """Shift all logits together so that the size is the one to hold."""
        if held[0] == 0:  # of several optimizers one counts
            self.steps += 1
        self._slope = None
        budget = self._budget_now()
        if budget is None:
            return
        size, self._slope = self._size_and_slope()
        slope = sum(s.sum() for s in self._slope)
        gain = self.config.bits_gain
        shift = ((budget - size) / slope.clamp(min=1e-6)).clamp(-_LARGEST_SHIFT / gain, _LARGEST_SHIFT / gain)
        logits = [quantizer.logits for quantizer in self.learned]
        torch._foreach_add_(logits, shift)
        torch._foreach_clamp_min_(logits, -_LOGIT_LIMIT / gain)
        torch._foreach_clamp_max_(logits, _LOGIT_LIMIT / gain)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is made anew: flat groups, sums of one process's optimizers."""
        return {**self.__dict__, "_groups": None, "_sums": None, "_slope": None, "_allocated_from": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and let the optimizers' hooks find this copy too."""
        super().__setstate__(state)
        self._sums = weakref.WeakKeyDictionary()
        _watch(self)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"{len(self.quantizers)} weights, {self.scope} scope"


_live: "weakref.WeakSet[Compression]" = weakref.WeakSet()
_hooks: list[Any] = []


def _watch(compression: Compression) -> None:
    """Have torch tell us of every optimizer step from now on; the hooks are installed with the first prepared model."""
    _live.add(compression)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _holders(optimizer: Optimizer) -> Iterator[tuple[Compression, list[int]]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for compression in list(_live):
        indices = [i for i, quantizer in enumerate(compression.learned) if id(quantizer.logits) in held]
        if indices:
            yield compression, indices


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for compression, indices in _holders(optimizer):
        compression.before_step(optimizer, indices)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for compression, indices in _holders(optimizer):
        compression.after_step(indices)


def find_compression(model: nn.Module) -> Compression | None:
    """The compression of a prepared model, wrapped (DDP, EMA) or not; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, Compression)), None)


def model_size(model: nn.Module, *, exact: bool = False) -> Tensor | float:
    """Size of a prepared model in MiB: ``M(b) = sum_s n_s b_s`` over groups s, DiffQ (arXiv:2104.09987), and all that is stored beside.

    Differs from the paper: MiB are said to be MiB, and ranges and the coding of the widths are part of the differentiable size too.

    Args:
        model: prepared, or a wrapper of a prepared model.
        exact: the achievable size with whole widths, those that eval() and convert use.

    Returns:
        A differentiable 0-d tensor, without a device sync; with ``exact`` a float.

    Raises:
        PreparationError: the model is not prepared.

    Example:
        >>> from diffq_fx import prepare_diffq
        >>> prepared = prepare_diffq(torch.nn.Linear(64, 64), torch.zeros(1, 64))
        >>> round(model_size(prepared, exact=True) * 2**20)  # 4 bits x 4096 weights, 4 bytes x 64 biases
        2304
    """
    compression = require_compression(model, "model_size")
    if exact:
        return mib(compression.exact_bits())
    compression.penalized = compression.penalized or torch.is_grad_enabled()
    return compression.expected_bits() / MIB_BITS


def require_compression(model: nn.Module, caller: str) -> Compression:
    """The compression of a prepared model, or an error that says how to get one."""
    from diffq_fx.errors import PreparationError

    compression = find_compression(model)
    if compression is None:
        raise PreparationError(f"{caller}: the {type(model).__name__} is not prepared. Call prepare_diffq(model, example_inputs) first.")
    return compression
