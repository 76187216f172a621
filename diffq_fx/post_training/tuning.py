"""Short training against the float model's outputs: what is left to gain once the bits are final, without labels."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffq_fx.compression import Compression
from diffq_fx.errors import DivergenceError
from diffq_fx.functional.groups import to_rows
from diffq_fx.methods.diffq import DiffQWeight
from diffq_fx.post_training.batches import Calibration
from diffq_fx.post_training.best import Best
from diffq_fx.post_training.limits import Limits
from diffq_fx.post_training.progress import ProgressBar
from diffq_fx.post_training.reference import FloatOutputs
from diffq_fx.training.finalize import reestimate_batch_norm
from diffq_fx.training.phases import coded_excess

_WEIGHT_RATE = 0.002
"""Adam's rate for a weight, in steps of its grid."""
_REST_RATE = 3e-4
"""For the norms, biases and all that stays in float, in parts of their root mean square."""
_RANGE_RATE = 3e-5
_WARM_UP = 0.1
_LOOKS = 10
"""Most looks at the held-out batches during the tuning."""
_STEPS_A_LOOK = 2
"""Fewest steps between looks, for each held-out batch: a look is to take a small part of the time."""
_PATIENCE = 3
"""Looks without an improvement until it ends."""
_CURVE = "distance to the float outputs, held-out batches"


@dataclass
class Tuned:
    """What tuning came to."""

    steps: int
    before: float
    """Distance of the held-out batches' outputs from those of the float model."""
    after: float
    diverged: str = ""
    """What was not finite, where the tuning ended by that; the best state before it is kept."""


def quantize_in_eval(model: nn.Module, compression: Compression) -> None:
    """Put the model in eval() and its quantizers in train(): no dropout, no batch statistics, gradients for bits and ranges."""
    model.eval()
    for quantizer in compression.quantizers:
        quantizer.train()


class Masters:
    """Float32 values of the parameters in half precision, in which steps add up that are smaller than those can hold."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._masters = [(each, each.detach().float()) for each in parameters if each.dtype in (torch.float16, torch.bfloat16)]

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        """Let an optimizer step find and move these values and gradients."""
        halves = [parameter.data for parameter, _ in self._masters]
        for parameter, master in self._masters:
            grad, parameter.grad = parameter.grad, None
            parameter.data = master
            parameter.grad = None if grad is None else grad.float()
        try:
            yield
        finally:
            for (parameter, master), half in zip(self._masters, halves, strict=True):
                parameter.grad = None
                parameter.data = half.copy_(master)


def tune(
    model: nn.Module,
    compression: Compression,
    wanted: FloatOutputs,
    data: Calibration,
    limits: Limits,
    bar: ProgressBar,
    best: Best,
) -> Tuned:
    """Train weights (straight-through estimator), ranges, norms and biases; keep the state that agrees best on the held-out batches."""
    quantize_in_eval(model, compression)
    before, began = best.distance, limits.share
    compression.history.add(compression.known.steps, {_CURVE: before})
    last = 1 - 2 * best.took  # a look at the held-out batches comes last; the step before it and the conversion take as much

    def over(steps: int) -> float:
        """Which part of the tuning is over; of the time whole hundredths, so that a run that needs little of it is the same twice."""
        if not limits.steps or began >= last:
            return 1.0
        return max(steps / limits.steps, math.floor(100 * (limits.share - began) / (last - began)) / 100)

    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        reestimate_batch_norm(model, data.large())
        quantize_in_eval(model, compression)
        if coded_excess(compression) > 0 or not best.look():
            best.restore()
    optimizer = torch.optim.Adam(_groups(model, compression), betas=(0.9, 0.95), fused=True)  # a fifth of a decoder's step otherwise
    masters = Masters(model.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    examples, steps, last_look, worse, looked_at, diverged = data.cycle(), 0, 0, 0, 0.0, ""
    while worse < _PATIENCE and (share := over(steps)) < 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(share / _WARM_UP + 0.1, 1) * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        wanted.distance(model, next(examples)).backward()
        for parameter in model.parameters():  # a table with sparse gradients stays as it is: the data has few of its rows
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = None
        try:
            with masters.stand_in():
                optimizer.step()
        except DivergenceError as error:
            diverged = str(error).splitlines()[0]
            break
        steps += 1
        bar.advance()
        share = over(steps)
        if share >= 1 or (share >= looked_at + 1 / _LOOKS and steps >= last_look + _STEPS_A_LOOK * len(data.held_out)):
            looked_at, last_look = share, steps
            worse = 0 if coded_excess(compression) <= 0 and best.look() else worse + 1
            compression.history.add(compression.known.steps, {_CURVE: best.latest})
    best.restore()
    return Tuned(steps, before, best.distance, diverged)


def _groups(model: nn.Module, compression: Compression) -> list[dict[str, object]]:
    """A rate for each parameter: how far it may go is told by the grid of a weight, and by the size of what stays in float.

    What stays in float does not move where its code is part of the size to hold: moved, constants and numbers of few digits have all of
    theirs, and weights would have fewer bits.
    """
    groups: list[dict[str, object]] = []
    is_in_the_code = compression.is_coded and compression.config.target_mib is not None
    known = {id(registry[name]) for registry, name in compression.rest} if is_in_the_code else set[int]()

    def add(parameters: Sequence[Tensor], rate: float) -> None:
        groups.append({"params": list(parameters), "lr": rate})
        known.update(map(id, parameters))

    for quantizer in compression.learned:
        add([quantizer.weight], _WEIGHT_RATE * _mean_step(quantizer))
        known.update(map(id, quantizer.parameters()))
    add([quantizer.logits for quantizer in compression.learned], 1e-3)  # final: they do not move, and tell whose step it is
    clips = [clip for quantizer in compression.learned if (clip := quantizer.clip) is not None]
    if clips:
        add(clips, _RANGE_RATE)
    for parameter in model.parameters():
        if id(parameter) not in known and parameter.requires_grad:
            add([parameter], _REST_RATE * _size(parameter))
    return groups


@torch.no_grad()
def _size(tensor: Tensor) -> float:
    return float(tensor.abs().float().square().mean().sqrt().clamp(min=1e-2))


@torch.no_grad()
def _mean_step(quantizer: DiffQWeight) -> float:
    rows_OI = to_rows(quantizer.weight.detach(), quantizer.spec.axis)
    return float(quantizer.params(rows_OI, quantizer.rounded_bits()).scale.mean())
