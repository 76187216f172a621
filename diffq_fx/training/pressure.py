"""How the pressure on the size reaches the bits without a change to the user's loop.

It works where every loop passes: at the optimizer's step. Torch calls a hook before and after each step of any optimizer; by then
gradients are accumulated, reduced over ranks, unscaled and clipped.

With a target, training is a constrained problem, min L(w, b) subject to M(b) = target, and is solved by projection:

- before the step, the bits' gradient ``g`` loses the part that would only change the size: ``g - lambda dM/dl`` with
  ``lambda = sum(g) / sum(dM/dl)``, the Lagrange multiplier. It has the scale of the loss whatever that is.
- after the step, all logits of the model are shifted together so that the size is what it should be.

So the size is met from the first step on, and what the optimizer learns is where the bits go. With a penalty (the paper's
lambda) the hook adds ``penalty * dM/dl`` once per step.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from diffq_fx import functional
from diffq_fx.kernels import moments
from diffq_fx.training.allocation import Part, common_shift
from diffq_fx.training.code_length import expected_code_length
from diffq_fx.training.groups_in_row import Segment
from diffq_fx.training.sensitivity import Sensitivity
from diffq_fx.training.size import MIB_BITS, SizeOfLogits

if TYPE_CHECKING:
    from diffq_fx.training.compression import Compression

_GRADIENT_RMS = 1e-3
"""The bits' gradient is brought to this size, so that a plain SGD moves them as an Adam would, whatever the scale of the loss."""

_ROUNDING = 1e-6
"""What the projection leaves of a gradient below this share of it is rounding: of one group for the whole model nothing else is left."""

_LOGIT_LIMIT = 6.0
"""``|gain * logit|`` stays below this: further out the sigmoid's slope is too small for a group ever to come back."""

_CODING_ROUNDS = 3
_CODING_EVERY = 50
"""Steps after which it is found again what entropy coding saves, where that is the size to hold; a tenth of a training if that is less."""

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


class HeldBits(NamedTuple):
    """The bits of one prepared model that an optimizer holds, looked up once a step: to find 300 takes as long as to move them."""

    weights: Sequence[int]
    """Indices of the weights whose logits it holds, rising."""
    logits: Sequence[Tensor]
    """The logits of all weights of the model."""


class SizePressure:
    """Acts on the bits of one prepared model around every optimizer step."""

    def __init__(self, compression: "Compression") -> None:
        self.compression = compression
        self.lambda_per_bit: Tensor | None = None
        self.sensitivity = Sensitivity(compression)
        self._forget()
        _watch(self)

    def _forget(self) -> None:
        """Start without the sums of any optimizer."""
        self._sums: weakref.WeakKeyDictionary[Optimizer, _GradientSums] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle needs: optimizers belong to this process."""
        return {"compression": self.compression, "lambda_per_bit": self.lambda_per_bit, "sensitivity": self.sensitivity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and let the hooks find this copy too."""
        self.__dict__.update(state)
        self._forget()
        _watch(self)

    @torch.no_grad()
    def start(self) -> None:
        """Give all groups the same bits, those that meet the target where there is one."""
        compression = self.compression
        if not compression.learned:
            return
        if compression.budget_bits() is None:
            compression.coded.measure()
            return
        for _ in range(_CODING_ROUNDS if compression.config.size == "entropy" else 1):
            self._start_at(compression.budget_bits() or 0)
            compression.coded.measure()

    def _start_at(self, budget: int) -> None:
        compression, groups = self.compression, self.compression.groups()
        parts = [(alike.limits, torch.tensor([float(alike.num_values)]).double()) for alike in groups.alike]
        zero = torch.zeros(1, dtype=torch.float64)
        same_bits = common_shift([Part(values, zero, own.min_bits, own.max_bits) for own, values in parts], budget - groups.fixed_bits)
        for quantizer in compression.learned:
            config = quantizer.config
            bits = torch.tensor(same_bits).clamp(config.min_bits, config.max_bits)
            quantizer.logits.fill_(float(functional.logits_from_bits(bits, config.min_bits, config.max_bits, config.bits_gain)))

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, held: HeldBits) -> None:
        """Project the bits' gradients, or add the penalty's, just before ``optimizer`` uses them."""
        config, learned, frozen, logits = self.compression.config, self.compression.learned, self.compression.frozen, held.logits
        for i in held.weights:
            idle = logits[i] if frozen else learned[i]._parameters.get("clip")
            if idle is not None:
                idle.grad = None  # so that no momentum and no decay moves it either
        if frozen:
            return
        if held.weights[0] == 0:  # of several optimizers one counts
            self.sensitivity.observe()
        if config.penalty is None and self.compression.budget_bits() is None:
            return
        grads = {i: grad for i in held.weights if (grad := logits[i].grad) is not None}
        if not grads:
            return
        # A fused optimizer divides by GradScaler's scale itself, later.
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale
        size_of = self.compression.size_of_logits()
        own = [grads.get(i, each) for i, each in enumerate(logits)]
        rows = [(segment, segment.gather(logits), segment.open(own)) for segment in size_of.groups.segments(tuple(grads))]
        if config.penalty is not None:
            for grad, slope in _tiles(size_of, rows):
                grad.add_(slope * (scale * config.penalty / MIB_BITS))
        else:
            multiplier, factor = self._multiplier_and_factor(optimizer, _tiles(size_of, rows), scale)
            self.lambda_per_bit = -multiplier
            onto = -multiplier * scale * factor
            for grad, slope in _tiles(size_of, rows):
                grad.mul_(factor).addcmul_(slope, onto)
        for segment, _, grad in rows:
            segment.close(grad, own)

    @torch.no_grad()
    def shorten_code(self, optimizer: Optimizer, held: set[int]) -> None:
        """Add the gradient of the code's length, times what a bit is worth, to those of the weights that ``optimizer`` is about to use."""
        compression = self.compression
        if not compression.learned or compression.config.size != "entropy" or compression.frozen:
            return
        penalty, quantizers = compression.config.penalty, [q for q in compression.learned if id(q.source[0]) in held]
        worth = self.lambda_per_bit if penalty is None else torch.tensor(penalty / MIB_BITS)
        trained = [w for q in quantizers if (w := q.source[0]).requires_grad and w.grad is not None and not w.grad.is_sparse]
        if not trained or worth is None:
            return
        scale = getattr(optimizer, "grad_scale", None)
        worth = worth.clamp(min=0) * (1.0 if scale is None else scale)  # one noisy step may say that more bits do harm
        with torch.enable_grad():
            length = expected_code_length(quantizers)
        for weight, slope in zip(trained, torch.autograd.grad(length, trained), strict=True):
            if (grad := weight.grad) is not None:
                grad.add_((slope * worth).to(grad.dtype))

    def _multiplier_and_factor(
        self, optimizer: Optimizer, tiles: Iterable[tuple[Tensor, Tensor]], scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The Lagrange multiplier over all optimizers that hold bits, and what brings the projected gradient to its size."""
        parts = [(moments(g, n), g.numel()) for g, n in tiles]
        g, n, gg, gn, nn = torch.stack([sums for sums, _ in parts]).sum(0).unbind()
        count = sum(numel for _, numel in parts)
        sums = torch.stack([g / scale, n, gg / (scale * scale), gn / scale, nn])
        old = self._sums.get(optimizer)
        last = torch.zeros_like(sums) if old is None else torch.stack([old.g, old.n, old.gg, old.gn, old.nn])
        g, n, gg, gn, nn = torch.where(torch.isfinite(sums).all(), sums, last).unbind()  # a fused optimizer skips such a step itself
        own = _GradientSums(g, n, gg, gn, nn, count)
        self._sums[optimizer] = own
        others = [sums for other, sums in self._sums.items() if other is not optimizer]
        total = _GradientSums(*(getattr(own, k) + sum(getattr(o, k) for o in others) for k in ("g", "n", "gg", "gn", "nn", "count")))
        multiplier = total.g / total.n.clamp(min=1e-30)
        square = (total.gg - 2 * multiplier * total.gn + multiplier**2 * total.nn) / total.count
        square = torch.maximum(square, total.gg * (_ROUNDING**2 / total.count)).clamp(min=1e-60)
        return multiplier.float(), (_GRADIENT_RMS / square.sqrt()).float()

    @torch.no_grad()
    def after_step(self, held: HeldBits) -> None:
        """Shift all logits together so that the size is the one to hold."""
        compression, is_first = self.compression, held.weights[0] == 0
        frozen, budget = compression.frozen, compression.budget_bits()
        if not frozen:
            moved = budget is not None and is_first and self.sensitivity.move_bits(budget)
            if moved or self._measures_now():
                compression.coded.measure()
            if budget is not None:
                self._shift(compression.budget_bits() or budget, held.logits)
        elif is_first and self._measures_now():
            compression.coded.hold()
        if is_first:
            compression.count_step()

    def _measures_now(self) -> bool:
        every = min(_CODING_EVERY, max((self.compression.config.training_steps or 10 * _CODING_EVERY) // 10, 1))
        return self.compression.progress[0] % every == 0

    def _shift(self, budget: int, logits: Sequence[Tensor]) -> None:
        compression = self.compression
        size_of = compression.size_of_logits()
        segments = size_of.groups.segments()
        rows = [segment.open(logits) for segment in segments]
        size, slope = size_of.total(logits, rows)
        gain = compression.config.bits_gain
        shift = ((budget - size) / slope.clamp(min=1e-6)).clamp(-_LARGEST_SHIFT / gain, _LARGEST_SHIFT / gain)
        for segment, row in zip(segments, rows, strict=True):
            for tile in segment.tiles():
                row[tile].add_(shift).clamp_(-_LOGIT_LIMIT / gain, _LOGIT_LIMIT / gain)
            segment.close(row, logits)


def _tiles(size_of: SizeOfLogits, rows: Sequence[tuple[Segment, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of the gradients, to be read or changed in place, and the derivative of the size in the same logits."""
    for segment, row, grad in rows:
        for tile in segment.tiles():
            yield grad[tile], size_of.slope(segment, row, tile)


_live: "weakref.WeakSet[SizePressure]" = weakref.WeakSet()
_hooks: list[Any] = []
_stepping: "weakref.WeakKeyDictionary[Optimizer, list[tuple[SizePressure, HeldBits]]]" = weakref.WeakKeyDictionary()
"""What the optimizers hold that are within a step."""


def _watch(pressure: SizePressure) -> None:
    """Have torch tell us of every optimizer step from now on; the hooks are installed with the first prepared model."""
    _live.add(pressure)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _holders(held: set[int]) -> Iterator[tuple[SizePressure, HeldBits]]:
    for pressure in list(_live):
        every = pressure.compression.logits
        weights = [i for i, logits in enumerate(every) if id(logits) in held]
        if weights:
            yield pressure, HeldBits(weights, every)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _stepping[optimizer] = list(_holders(held))
    for pressure, bits in _stepping[optimizer]:
        pressure.before_step(optimizer, bits)
    for pressure in list(_live):  # the weights may be another optimizer's than the bits
        pressure.shorten_code(optimizer, held)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for pressure, bits in _stepping.pop(optimizer, ()):
        pressure.after_step(bits)
