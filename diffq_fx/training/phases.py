"""The phases of a training: the bits are sought while the size is held; then they are final and the weights train on, rounded."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from diffq_fx import _compat
from diffq_fx.budget import pressure, sensitivity
from diffq_fx.budget.allocation import CLOSE_ENOUGH_CODED
from diffq_fx.budget.size import MIB_BITS, exact_bits
from diffq_fx.compression import Compression
from diffq_fx.errors import DivergenceError
from diffq_fx.methods.diffq import DiffQWeight
from diffq_fx.sharded import gathered, is_sharded, own_part, whole, wholes
from diffq_fx.weights import first_not_finite

_CODING_ROUNDS = 3
_CODING_EVERY = 50
"""Steps after which it is found again what entropy coding saves, where that is the size to hold; a tenth of a training if that is less."""
_SPREAD = "bits a weight, standard deviation"
_LARGEST_STRETCH = 0.1
"""Bits a weight that the steps of all weights may gain or lose at once."""


class Held(NamedTuple):
    """What an optimizer holds of one prepared model, looked up once a step: to find 300 takes as long as to move them."""

    compression: Compression
    weights: Sequence[int]
    """Indices of the weights whose logits it holds, rising."""
    logits: Sequence[Tensor]
    """The logits of all weights of the model."""
    coded: Sequence[DiffQWeight]
    """Weights themselves that it holds, where the size is that of their code."""
    ranges: Sequence[Tensor]
    """Learned ranges that it holds and that have not trained yet, once they are about to."""
    kept: list[Tensor]
    """Final logits, in one row: neither momentum nor decay is to move them."""
    counts: bool
    """Whether its step is one of the training: of several optimizers one counts."""


@torch.no_grad()
def start(compression: Compression) -> None:
    """Give all groups the same bits, those that meet the target where there is one."""
    if not compression.learned:
        return
    if compression.budget_bits() is None:
        measure_coding(compression)
        return
    for _ in range(_CODING_ROUNDS if compression.is_coded else 1):
        with compression.changing_bits() as state:
            state.set_bits(pressure.same_bits(compression.groups(), compression.budget_bits() or 0))
        measure_coding(compression)


@torch.no_grad()
def before_step(optimizer: Optimizer, held: Held, *, is_first_time: bool) -> None:
    """Project the bits' gradients, or add the penalty's, just before ``optimizer`` uses them; weights that share a width share them."""
    compression = held.compression
    _refuse_what_is_not_finite(held)
    grads = {i: grad for i in held.weights if (grad := held.logits[i].grad) is not None}
    if compression.frozen:
        for grad in grads.values():
            grad.zero_()  # and not None: checkpoints want a state of the optimizer for every parameter
        held.kept.append(_compat.flatten([own_part(held.logits[i]) for i in held.weights]).clone())
        return
    config, budget = compression.config, compression.budget_bits()
    if is_first_time and _gathers(compression):
        _observe(held, grads)
    presses = config.penalty is not None or budget is not None
    if not grads or not (presses or compression.groups().in_sets):
        return
    with gathered(list(grads.values())) as every:
        whole_grads = dict(zip(grads, every, strict=True))
        if presses:
            _press(held, whole_grads, _scale(optimizer))
        compression.groups().even_out(whole_grads)


def _press(held: Held, grads: Mapping[int, Tensor], scale: Tensor | float) -> None:
    """Project the gradients of the bits, or add the penalty's; they are still multiplied with ``scale``."""
    compression = held.compression
    penalty, state = compression.config.penalty, compression.bit_state()
    with pressure.open_rows(state, grads) as rows:
        if penalty is not None:
            pressure.add_penalty(state, rows, scale * penalty / MIB_BITS)
            return
        sums_W6 = compression.pressure_sums
        for run in _in_runs(held.weights):  # no index that would have to be copied to the device
            sums_W6[run].zero_()
        sums_W6[held.weights[0]] = pressure.gradient_sums(state, rows, scale)
        pressure.project(state, rows, sums_W6.sum(0), scale)


def ranges_begin(compression: Compression) -> bool:
    """Whether this is the step in which the learned ranges begin to train."""
    steps, frozen, frozen_at, *_ = compression.known
    return frozen and steps == frozen_at


@torch.no_grad()
def after_step(held: Held) -> None:
    """Move the bits once it is known where to, hold the size, and go on to the next phase."""
    compression = held.compression
    if held.kept:
        own = [own_part(held.logits[i]) for i in held.weights]
        _compat.copy_each(own, _compat.unflatten(held.kept.pop(), own))
    if not compression.frozen:
        budget = compression.budget_bits()
        moved = budget is not None and held.counts and _move_bits(compression, budget)
        if moved or _measures_now(compression):
            measure_coding(compression)
        if budget is not None or compression.groups().in_sets:
            with compression.changing_bits() as state:
                state.groups.even_out(dict(enumerate(state.logits)))
                if budget is not None:
                    pressure.shift_to(state, compression.budget_bits() or budget)
    elif held.counts and compression.scales_ranges and _measures_now(compression):
        hold_coded_size(compression)
    if held.counts:
        _count_step(compression)


@torch.no_grad()
def shorten_code(optimizer: Optimizer, held: Held) -> None:
    """Add the gradient of the code's length, times what a bit is worth, to those of the weights that ``optimizer`` is about to use."""
    compression = held.compression
    if not held.coded or compression.frozen:
        return
    penalty = compression.config.penalty
    if penalty is None and not compression.config.has_target:
        return
    worth = pressure.worth_of_a_bit(compression.pressure_sums.sum(0)) if penalty is None else torch.tensor(penalty / MIB_BITS)
    trained = [w for q in held.coded if (w := q.weight).requires_grad and w.grad is not None and not w.grad.is_sparse]
    if not trained:
        return
    worth = worth.clamp(min=0) * _scale(optimizer)  # one noisy step may say that more bits do harm
    with torch.enable_grad():
        length = compression.code_length(held.coded)
    for weight, slope in zip(trained, torch.autograd.grad(length, trained), strict=True):
        if (grad := weight.grad) is not None:
            grad.add_((slope * worth).to(grad.dtype))


@torch.no_grad()
def measure_coding(compression: Compression) -> None:
    """Find what entropy coding saves at the bits of this moment, where that is the size to hold: it needs all levels."""
    if not compression.is_coded:
        return
    bits_T, values_T = compression.bit_state().bits_T(), compression.groups().values_T
    below_T = bits_T.floor().clamp(min=1)
    share = torch.dot(values_T, bits_T - below_T) / values_T.sum()  # bits are fractional: between those below and those above
    below, above = (compression.saved_at(width_T) for width_T in (below_T, below_T + 1))
    compression.note(bits_saved=round(below + float(share) * (above - below)), rest_bits=compression.rest_bits_now())


def hold_coded_size(compression: Compression) -> None:
    """Scale all ranges so that final widths take the target again."""
    compression.note(rest_bits=compression.rest_bits_now())
    stretch_ranges(compression, coded_excess(compression))


def coded_excess(compression: Compression) -> float:
    """Coded bits a weight that final widths take beyond a little less than the target; 0 where they take about that, or there is none."""
    budget = compression.budget_bits(measured=True) if compression.is_coded else None
    if budget is None:
        return 0.0
    groups, width_T, target = compression.groups(), compression.width_T(), budget - compression.known.bits_saved
    excess, room = exact_bits(groups, width_T) - compression.saved_at(width_T) - target, CLOSE_ENOUGH_CODED * target
    return 0.0 if -room <= excess <= 0 else (excess + room / 2) / groups.num_weights


def stretch_ranges(compression: Compression, bits: float) -> None:
    """Scale all ranges so that a weight takes so many bits less: steps that are 1 % longer save 0.014."""
    if bits:
        compression.range_scale.mul_(2 ** min(max(bits, -_LARGEST_STRETCH), _LARGEST_STRETCH))


def _in_runs(rising: Sequence[int]) -> list[slice]:
    """Rising numbers as slices."""
    starts = [i for i, number in enumerate(rising) if i == 0 or rising[i - 1] != number - 1]
    return [slice(rising[first], rising[after - 1] + 1) for first, after in zip(starts, [*starts[1:], len(rising)], strict=True)]


def _scale(optimizer: Optimizer) -> Tensor | float:
    """What gradients are still multiplied with: a fused optimizer divides by GradScaler's scale itself, later."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


def _gathers(compression: Compression) -> bool:
    last = compression.config.sensitivity_step
    return last is not None and compression.known.steps < last


def _observe(held: Held, grads: Mapping[int, Tensor]) -> None:
    """Add up what the gradients of the weights and, before they are projected, of the logits tell."""
    learned = held.compression.learned
    for quantizer in learned if held.counts else ():
        grad = quantizer.weight.grad
        sensitivity.observe(quantizer.spec, None if grad is None else whole(grad), quantizer.get_buffer("gradient_sums"))
    for i, grad in grads.items():
        learned[i].get_buffer("gradient_sums")[2] += whole(grad).nan_to_num(0, 0, 0)


def _move_bits(compression: Compression, budget: int) -> bool:
    """After the last step that counts, give every group the bits it asks for, all together within the budget; whether it did."""
    if compression.known.steps + 1 != compression.config.sensitivity_step:
        return False
    spans = [quantizer.span_in_training(whole(quantizer.weight)) for quantizer in compression.learned]
    sums = [quantizer.get_buffer("gradient_sums") for quantizer in compression.learned]
    for quantizer, own in zip(compression.learned, sums, strict=True):
        sensitivity.measure_curvature(own, *quantizer.squared_noise())
    asked = [sensitivity.asked_bits(q.spec, *each) for q, *each in zip(compression.learned, sums, spans, strict=True)]
    bits_T = sensitivity.bits_within(compression.groups(), torch.cat([each.reshape(-1) for each in asked]), budget)
    if bits_T is None:
        return False  # no gradient reached any weight
    with compression.changing_bits() as state:
        state.set_bits(bits_T)
    return True


def _measures_now(compression: Compression) -> bool:
    every = min(_CODING_EVERY, max((compression.config.training_steps or 10 * _CODING_EVERY) // 10, 1))
    return compression.known.steps % every == 0


def _count_step(compression: Compression) -> None:
    """Note a step of the bits; the one that ends the noise freezes them."""
    steps = compression.known.steps + 1
    compression.note(steps=steps)
    _log_bits(compression, steps)
    freeze_step = compression.config.freeze_step
    if freeze_step is not None and steps >= freeze_step:
        compression.freeze()


def _log_bits(compression: Compression, step: int) -> None:
    """Keep how far the bits have moved, and what they are worth, until they are final."""
    if compression.frozen or not compression.history.wants(_SPREAD, step):
        return
    bits_T, values_T = compression.bit_state().bits_T(), compression.groups().values_T
    share_T = values_T / values_T.sum()
    mean = (bits_T * share_T).sum()
    logged: dict[str, float | Tensor] = {_SPREAD: ((bits_T - mean).square() * share_T).sum().sqrt()}
    if compression.config.has_target:  # no look whether a step has been: on a GPU it would make each step wait
        logged["lambda, loss per MiB"] = pressure.worth_of_a_bit(compression.pressure_sums.sum(0)) * MIB_BITS
    else:
        logged["bits a weight, mean"] = mean
    compression.history.add(step, logged)


def _refuse_what_is_not_finite(held: Held) -> None:
    """End a training that has diverged, before the step; on a CPU, since elsewhere the look would make every step wait."""
    compression = held.compression
    if compression.learned[0].logits.device.type != "cpu":
        return
    learned = [compression.learned[i] for i in held.weights]
    small = [clip for q in learned if (clip := q.clip) is not None] if compression.frozen else [held.logits[i] for i in held.weights]
    looked_at = wholes([*small, *(each.grad for each in small if each.grad is not None)])
    sums = [_compat.flatten(looked_at).sum()] if looked_at else []
    if compression.frozen:  # before, the gradients of the bits tell of the weights; no rank looks at its part of one alone
        sums += [weight.detach().sum(dtype=torch.float32) for q in learned if not is_sharded(weight := q.weight)]
    if not sums or bool(torch.isfinite(torch.stack(sums).sum())):
        return
    values = [each for quantizer in compression.learned for each in quantizer.trained_values()]
    gradients = [(f"the gradient of {name}", tensor.grad) for name, tensor in values if tensor.grad is not None]
    if found := first_not_finite((name, whole(tensor)) for name, tensor in (*values, *gradients)):  # the cause before its effects
        raise DivergenceError(
            f"optimizer step {compression.known.steps + 1}: {found}. The step was not made.\n"
            "  Lower the learning rate, clip the gradients, or load an earlier state; with float16 use torch.amp.GradScaler."
        )
