"""What the callbacks of transformers and Lightning have in common: how long the training is, and how far it is."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from diffq_fx.budget.size import MIB_BITS
from diffq_fx.compression import Compression, require_compressions
from diffq_fx.errors import DiffQWarning, PreparationError
from diffq_fx.integrations.method_json import choice_to_json
from diffq_fx.methods import DiffQConfig
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.model_size import model_size
from diffq_fx.training.steps import IDLE_BITS


def begin(caller: str, model: nn.Module, optimizers: Iterable[Optimizer], steps_left: float, *, resumed: Any = None) -> Any:
    """Check what is about to train, and tell it how long it will.

    Args:
        caller: what stands in messages.
        model: prepared, or a module that holds prepared ones.
        optimizers: all that are to train it.
        steps_left: optimizer steps that this training will make; may be infinite.
        resumed: what this function returned for the training that a checkpoint is of.

    Returns:
        The settings of the compression as the user gave them, as JSON.

    Raises:
        PreparationError: the model is not prepared, or the checkpoint is of other settings.
        ValueError: the optimizers were built before the model was prepared, or its bits are frozen.
    """
    compressions = require_compressions(model, caller)
    _refuse_other_optimizers(caller, compressions, optimizers)
    settings = [_settings(each) for each in compressions]
    if resumed is not None and resumed != settings:
        raise PreparationError(
            f"{caller}: the checkpoint is of another configuration: {_difference(resumed, settings)}. "
            "Prepare the model as it was for the checkpoint, or train anew."
        )
    for compression in compressions:
        if compression.learned and math.isfinite(steps_left):
            _plan(caller, compression, compression.known.steps + int(steps_left))
    return settings


def progress(model: nn.Module) -> dict[str, float]:
    """What the model would be if it were converted now, and how far its training is.

    Bits a weight, size in MiB; with trained bits the phase (0: noise, 1: final bits), with a target the loss that the last MiB is worth.
    """
    compressions = require_compressions(model, "progress")
    found = {"diffq/mib": model_size(model, exact=True)}
    footprints = [quantizer.footprint() for compression in compressions for quantizer in compression.quantizers]
    found["diffq/bits"] = sum(each.payload_bits for each in footprints) / sum(sum(each.histogram.values()) for each in footprints)
    if learned := [compression for compression in compressions if compression.learned]:
        found["diffq/phase"] = float(all(compression.frozen for compression in learned))
        if (worth := learned[0].lambda_per_bit) is not None:
            found["diffq/lambda"] = float(worth) * MIB_BITS
    return found


def keep_losses(model: nn.Module, logs: Mapping[str, Any]) -> None:
    """Keep the losses among what is logged, numbers and tensors of one, for the curves of the report."""
    numbers = {name: value for name, value in logs.items() if isinstance(value, int | float) or getattr(value, "shape", None) == ()}
    losses = {name: float(value) for name, value in numbers.items() if "loss" in name}
    for compression in require_compressions(model, "keep_losses"):
        compression.log(**losses)


def _settings(compression: Compression) -> list[Any]:
    """The settings as JSON, without the length of the training: it may be resumed for longer."""
    choice = choice_to_json(compression.method)
    return [[pattern, kind, {name: value for name, value in own.items() if name != "training_steps"}] for pattern, kind, own in choice]


def _difference(old: list[Any], new: list[Any]) -> str:
    """The first difference of two lists of settings, in words."""
    pairs = [pair for before, now in zip(old, new, strict=False) for pair in zip(before, now, strict=False)]
    for (pattern, kind, before), (_, other, now) in pairs:
        for name in before.keys() | now.keys() if kind == other else ():
            if before.get(name) != now.get(name):
                return f"{name}={before.get(name)!r} for {pattern!r} there, {now.get(name)!r} here"
    return f"{old} there, {new} here"


def _refuse_other_optimizers(caller: str, compressions: Sequence[Compression], optimizers: Iterable[Optimizer]) -> None:
    if any(each.learned and not each.frozen and not each.asks_for_gradients for each in compressions):
        raise ValueError(f"{caller}: {IDLE_BITS}")
    held = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    for quantizer in (quantizer for compression in compressions for quantizer in compression.quantizers):
        if any(parameter.requires_grad and id(parameter) not in held for parameter in quantizer.parameters()):
            raise ValueError(
                f"{caller}: the optimizer does not hold the bits of weight {quantizer.spec.name!r}: it was built before the model was "
                "prepared. Build it from the prepared model's parameters(), or call setup_optimizer(optimizer, model)."
            )


def _plan(caller: str, compression: Compression, steps: int) -> None:
    """Set what the config left open, and warn of what does not fit."""
    if compression.config.training_steps is None:
        entries = (
            (name, replace(each, training_steps=steps) if isinstance(each, DiffQConfig) else each)
            for name, each in compression.method.entries
        )
        compression.method = MethodChoice(tuple(entries))
        for quantizer in compression.learned:
            quantizer.config = replace(quantizer.config, training_steps=steps)
    final = compression.config.freeze_step
    if not compression.frozen and final is not None and final > steps:
        warnings.warn(
            f"{caller}: this training ends in the noise phase. Its bits become final after step {final} "
            f"(training_steps={compression.config.training_steps}), and it has {steps} steps: prepare with training_steps={steps}.",
            DiffQWarning,
            stacklevel=2,
        )
