"""How the pressure on the size reaches the bits without a change to the user's loop: what is done around an optimizer's step.

Every loop passes there, with gradients that are accumulated, reduced over ranks, unscaled and clipped. Torch calls a hook before and
after each step of any optimizer. Where the gradients are made by a closure, it is this that is followed by what else comes before a step.
"""

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from diffq_fx import _compat
from diffq_fx.compression import Compression, live
from diffq_fx.errors import DiffQError, DiffQWarning
from diffq_fx.training.phases import Held, after_step, before_step, ranges_begin, shorten_code

_PATIENCE = 50
"""Steps of optimizers that hold no parameter of a model, which trains between them, until that is an error."""
_FLAT = (
    "Build the optimizer from the prepared model's parameters(). Optimizers over flat copies of these, such as DeepSpeed's ZeRO, are not "
    "supported: use FSDP2 (fully_shard) or DistributedDataParallel."
)
NOT_TRAINED = "no optimizer step has moved the bits yet"
"""A note of the report."""
NO_OPTIMIZER = (
    "Build the optimizer from the prepared model's parameters(), or add the bits to yours with setup_optimizer(optimizer, model)."
)
"""What to do where no optimizer holds the bits."""
IDLE_BITS = (
    "The bits have requires_grad=False, as get_peft_model leaves all that it wraps. Prepare the model that has the adapters, "
    "prepare_diffq(get_peft_model(...), ...), or call freeze_bits(model) first, for adapters on final bits."
)

_NOT_TO_TRAIN = "If it is not to train in these steps, as a generator while its critic does, call it under torch.no_grad()."


@dataclass(eq=False)
class _Step:
    """A step that an optimizer is within."""

    optimizer: Optimizer
    frame: FrameType
    """Torch's call of it: a step that ended with an exception is one whose frame no longer runs."""
    held: Sequence[Held] = ()
    """What it holds of each prepared model; nothing where the step changes nothing."""
    prepared: set[Compression] = field(default_factory=set)
    """Models whose gradients are as the step needs them."""


class _Steps(threading.local):
    """The steps that this thread is within, from the outermost: some optimizers (SAM, Lookahead, ZeRO) step another one in their step."""

    def __init__(self) -> None:
        self.stack: list[_Step] = []


_steps = _Steps()


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not live:
        return None
    frame, stack = _compat.caller(), _steps.stack
    stack[:] = [step for step in stack if _runs(step.frame, frame)]
    parameters = {*itertools.chain.from_iterable(map(id, group["params"]) for group in optimizer.param_groups)}
    step = _Step(optimizer, frame, () if _changes_nothing(optimizer) else list(_holdings(parameters)))
    stack.append(step)
    _look_at_idle_bits(parameters, frame.f_back or frame)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        _prepare(step, again=False)
        return None
    prepared = _followed_by(closure, lambda: _prepare(step, again=True))
    return ((args[0], prepared, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": prepared})


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stack = _steps.stack
    if not any(step.optimizer is optimizer for step in stack):
        return
    while (step := stack.pop()).optimizer is not optimizer:
        pass
    for held in step.held:
        if held.weights and not any(outer.compression is held.compression for around in stack for outer in around.held if outer.weights):
            after_step(held)


def _runs(frame: FrameType, within: FrameType | None) -> bool:
    while within is not None and within is not frame:
        within = within.f_back
    return within is frame


def _followed_by(closure: Callable[[], Any], action: Callable[[], None]) -> Callable[[], Any]:
    def both() -> Any:
        result = closure()
        action()
        return result

    return both


def _prepare(step: _Step, *, again: bool) -> None:
    """Do what comes before a step; ``again`` where a closure has made the gradients anew."""
    around = _steps.stack[: _steps.stack.index(step)] if step in _steps.stack else []
    for held in step.held:
        for clip in held.ranges:  # their state begins now, whatever steps the optimizer has counted before
            step.optimizer.state.pop(clip, None)
        if not again and any(held.compression in outer.prepared for outer in around):
            continue
        if held.weights:
            if held.compression.config.has_target and _compat.in_backward():
                raise DiffQError(
                    "an optimizer step inside backward() (from a hook on the gradient of a parameter) cannot hold a size target: it "
                    "changes the bits of weights whose gradients are still to come. Step after backward(), or train with penalty and "
                    "target_bits=None."
                )
            before_step(step.optimizer, held, is_first_time=held.compression not in step.prepared)
        shorten_code(step.optimizer, held)
        step.prepared.add(held.compression)


def _holdings(parameters: set[int]) -> Iterator[Held]:
    """What an optimizer with these parameters, by their ids, holds of each prepared model."""
    for compression in list(live):
        logits = compression.logits
        weights = [i for i, each in enumerate(logits) if id(each) in parameters]
        coded = [q for q in compression.learned if id(q.place[0].get(q.place[1])) in parameters] if compression.is_coded else []
        clips = [q._parameters["clip"] for q in compression.learned if "clip" in q._parameters]
        begin = not parameters.isdisjoint(map(id, clips)) and ranges_begin(compression)
        ranges = [clip for clip in clips if clip is not None and id(clip) in parameters] if begin else []
        if weights or coded or ranges:
            yield Held(compression, weights, logits, coded, ranges, [], bool(weights) and compression.begins_round(weights[0]))


def _look_at_idle_bits(parameters: set[int], where: FrameType) -> None:
    """End a training whose steps tell nothing of the bits: they ask for no gradient, or the optimizer works on copies of the parameters.

    Warn of one whose optimizer holds other parameters of the model alone, at the line that calls its step, ``where``.
    """
    for compression in list(live):
        held = not parameters.isdisjoint(map(id, compression.logits))
        if held:  # also where another optimizer has stepped first after the same backward
            compression.steps_without_bits = 0
        if compression.foreign_steps and compression.has_one_of(parameters):
            compression.foreign_steps = 0
        if not compression.next_step():
            continue
        asks, final = compression.asks_for_gradients, compression.frozen
        if held and not (asks or final or any(quantizer.weight.requires_grad for quantizer in compression.learned)):
            raise DiffQError(f"an optimizer holds the bits of a prepared model, of which neither bits nor weights train.\n  {IDLE_BITS}")
        idle = (asks or not final) and not compression.has_one_of(parameters)  # on a base with final bits adapters may train
        compression.foreign_steps = compression.foreign_steps + 1 if idle else 0
        if compression.foreign_steps >= _PATIENCE:
            raise DiffQError(
                f"{_PATIENCE} optimizer steps in a row held no parameter of a prepared model that trains between them: "
                f"its bits do not move, and its size is not held.\n  {_FLAT if asks else IDLE_BITS} {_NOT_TO_TRAIN}"
            )
        compression.steps_without_bits = 0 if held or final else compression.steps_without_bits + 1
        if compression.steps_without_bits == _PATIENCE:
            message = (
                f"{_PATIENCE} optimizer steps in a row held none of the bits of a prepared model that trains between them: "
                f"they do not move, and the noise does not end. {NO_OPTIMIZER}"
            )
            warnings.warn_explicit(message, DiffQWarning, where.f_code.co_filename, where.f_lineno)


def _changes_nothing(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer will skip the step by itself, or torch.distributed.checkpoint makes it for the sake of a state."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return True
    rates = [group.get("lr") for group in optimizer.param_groups]
    if not all((isinstance(lr, float | int) or (isinstance(lr, Tensor) and lr.device.type == "cpu")) and float(lr) == 0 for lr in rates):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not any(bool(gradient.any()) for gradient in gradients)


register_optimizer_step_pre_hook(_compat.leave_to_python(_before))  # a step may be compiled, and the values of the bits choose what is done
register_optimizer_step_post_hook(_compat.leave_to_python(_after))
