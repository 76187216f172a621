"""compress: a float model and unlabelled batches in, a converted model of a given size out."""

import gc
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffq_fx.arguments import check_flags, check_whole
from diffq_fx.capture.copies import copy_replacing, copy_sharing_parameters
from diffq_fx.compression import Compression
from diffq_fx.convert import convert
from diffq_fx.errors import PreparationError
from diffq_fx.example import restored_random_state
from diffq_fx.methods.base import Method
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.methods.ste import STE
from diffq_fx.parts import CHILD
from diffq_fx.post_training.batches import CALLER, Calibration, refuse_too_little_memory
from diffq_fx.post_training.best import Best
from diffq_fx.post_training.limits import Limits
from diffq_fx.post_training.progress import ProgressBar
from diffq_fx.post_training.reference import FloatOutputs
from diffq_fx.post_training.round_weights import round_weights
from diffq_fx.post_training.tuning import Tuned, quantize_in_eval, tune
from diffq_fx.prepare import prepare_as
from diffq_fx.threads import TRACING
from diffq_fx.training.output_loss import Kind, refuse_kind
from diffq_fx.unfit import refuse_unfit

_STEPS = 300
_MINUTES = 10.0
_COPIES = 6
"""Of the weights that are held at once, in float32 or wider: float, rounded, gradients, two of Adam's, the best so far."""
_NO_MOVE = 1e-30
_SENSITIVITY_SHARE, _LEAST_STEPS = 0.2, 4
"""The part of the time until which the sensitivity is to be known, and the fewest steps that tell it."""


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: DiffQConfig | Mapping[str, Method] | None = None,
    *,
    teacher: nn.Module | None = None,
    kind: Kind = "auto",
    steps: int | None = None,
    minutes: float | None = None,
    progress: bool = True,
) -> nn.Module:
    """Compress a float model to an exact size by unlabelled batches: no labels, no loss and no training loop.

    The bits go where the float model's outputs depend on the weights most, under the noise of DiffQ (arXiv:2104.09987). Then the columns
    of each weight are rounded one after another, later ones making up for the error of earlier ones (GPTQ, arXiv:2210.17323). Last,
    weights, ranges, norms and biases (these not with ``target_mib`` of a packed file, where their digits would take bits from weights) are
    tuned by distillation: the outputs are to be those of the float model, by KL divergence where they look like scores of classes, else by
    their relative squared error. A part of the batches is held out; the state that agrees best on these is kept, that before anything moved
    among them, and the tuning ends when they stop improving.

    The model is left as it was, interrupted or not; hooks on it are copied with it, and fire. Within ``torch.autocast`` its forwards
    have that type, which may be several times as fast; sums, ranges and rounding are float32.

    Args:
        model: a float model.
        batches: inputs as the model is called with: a tensor, a tuple of positional or a dict of keyword arguments each, without labels
            (of a loader of pairs: ``(x for x, y in loader)``). A few hundred rows do, of a language model some
            16,000 tokens: small batches, of 256 say, leave time for more steps. At most 1024 batches and 1 GiB are read.
        config: the settings, with a target; by default 4 bits a weight. Or a mapping as for :func:`~diffq_fx.prepare`, in which
            :class:`~diffq_fx.methods.STE` gives some weights a fixed width: ``{"*embed*": STE(bits=8), "*": DiffQConfig(...)}``.
        teacher: another model with the same outputs to imitate; by default the float model. Of outputs with names those that are called
            logits or scores are compared alone, where there are any.
        kind: "scores" for class scores in all outputs, "features" for none; "auto" for those that are called so, or whose rows choose.
        steps: most steps of the tuning, 300 by default; 0 for none.
        minutes: most minutes of it all, about; 10 by default. Where they are few, the sensitivity takes fewer steps (until a fifth of the
            time is over), second moments come from fewer batches (a fifth), and the tuning has what is left.
        progress: whether a bar shows the stage and the time left, on stderr.

    Returns:
        The converted model, as from :func:`~diffq_fx.convert`. Its ``compression.notes`` say what was done, and which weights were
        rounded without compensation; :func:`~diffq_fx.bits_report` has them.

    Raises:
        ValueError: there is no batch, batches differ in structure or hold labels, the model does not run on them, returns a loss or an
            output that is not finite, or the target is missing or cannot be reached.
        TypeError: an argument is of another type.
        PreparationError: as for :func:`~diffq_fx.prepare_diffq`, or there is too little memory.
        CaptureError: as for :func:`~diffq_fx.prepare_diffq`.

    Example:
        >>> from diffq_fx import bits_report
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> converted = compress(model, [torch.randn(16, 64) for _ in range(8)], DiffQConfig(target_bits=4), steps=10, progress=False)
        >>> bits_report(converted).average_bits_in_all <= 4
        True
    """
    began = time.monotonic()
    choice = _choice(config)
    limits = limits_of(steps, minutes, began)
    check_flags(CALLER, progress=progress)
    refuse_kind(CALLER, kind)
    refuse_unfit(model, CALLER)
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(f"{CALLER}: teacher must be a torch.nn.Module, got {type(teacher).__name__}.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    callers_types = _callers_autocast(device.type)
    with TRACING, torch.inference_mode(False), torch.enable_grad(), restored_random_state(0), torch.autocast(device.type, enabled=False):
        data = Calibration(batches, device)
        refuse_too_little_memory(_COPIES * sum(max(each.nbytes, 4 * each.numel()) for each in model.parameters()), device)
        wanted = FloatOutputs(model, teacher, data, kind)
        with ProgressBar(shown=progress) as bar:
            bar.stage("preparing", 1)
            own = copy_replacing(model, {}).requires_grad_(True).eval()
            example = data.small_example(copy_sharing_parameters(own))
            prepared = prepare_as(CALLER, own, example, dict(choice.entries), "auto")
            own_state = _OwnState(prepared, vars(prepared)[CHILD])
            gc.collect()  # trials of the preparation leave copies of the weights in reference cycles
            with callers_types:
                _compress_prepared(prepared, wanted, data, limits, bar)
            own_state.restore()
            bar.stage("converting", 1)
            return convert(prepared)


class _OwnState:
    """What a model's forwards may count or keep in buffers, numbers and texts: that of the calibration is none of the converted model's."""

    def __init__(self, model: nn.Module, compression: Compression) -> None:
        ours = {each for part in (compression, *compression.quantizers) for each in part.modules()}
        modules = [module for module in model.modules() if module not in ours]
        self._values = [
            (vars(module), name, value)
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, int | float | str | None) and name != "training"
        ]
        kept = [module for module in modules if not isinstance(module, _BatchNorm)]  # whose statistics are measured anew
        self._buffers = [
            (each._buffers, name, value, value.clone()) for each in kept for name, value in each._buffers.items() if value is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back."""
        for attributes, name, value in self._values:
            attributes[name] = value
        for buffers, name, tensor, value in self._buffers:
            buffers[name] = tensor.copy_(value)


def _compress_prepared(model: nn.Module, wanted: FloatOutputs, data: Calibration, limits: Limits, bar: ProgressBar) -> None:
    compression: Compression = vars(model)[CHILD]
    compression.scales_ranges = False
    best = Best(model.eval(), wanted, data, limits)
    best.look()  # at plain rounding with the same bits everywhere: nothing that is worse is kept
    seek_bits(model, compression, wanted, data, limits, bar)
    failed = round_weights(model, compression, data, limits, bar, best)
    bar.stage("tuning", limits.steps)
    tuned = tune(model, compression, wanted, data, limits, bar, best)
    compression.notes += (*failed, *_notes(data, wanted, tuned))


def _choice(config: DiffQConfig | Mapping[str, Method] | None) -> MethodChoice:
    """The methods: those with trainable bits, which have a target and whose phases are those of compress, and fixed widths."""
    choice = MethodChoice.of(DiffQConfig() if config is None else config, CALLER)
    entries: list[tuple[str, Method]] = []
    for pattern, method in choice.entries:
        if not isinstance(method, DiffQConfig | STE):
            raise TypeError(
                f"{CALLER}: {pattern!r} has {type(method).__name__}, which needs a training. Give a DiffQConfig, or STE for a fixed width."
            )
        if isinstance(method, DiffQConfig) and not method.has_target:
            found = "no target" if method.penalty is None else f"penalty={method.penalty:g}"
            raise ValueError(f"{CALLER}: {found} is no size to meet. Give target_bits or target_mib.")
        entries.append((pattern, replace(method, training_steps=None) if isinstance(method, DiffQConfig) else method))
    if not any(isinstance(method, DiffQConfig) for _, method in entries):
        raise ValueError(f"{CALLER}: a DiffQConfig with a target is needed for some of the weights, got {choice.name} for all.")
    return MethodChoice(tuple(entries))


def limits_of(steps: int | None, minutes: float | None, began: float) -> Limits:
    """The limits that these arguments of a user say, of a compression that began then."""
    if steps is not None:
        check_whole(CALLER, "steps", steps, 0)
    if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, int | float) or not minutes > 0):
        raise ValueError(f"{CALLER}: minutes must be a positive number, got {minutes!r}.")
    return Limits(_STEPS if steps is None else steps, 60 * (_MINUTES if minutes is None else minutes), began)


def _callers_autocast(device: str) -> torch.autocast:
    """The autocast in which the call was made, without its cache: that would keep weights as they were before a step."""
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False)


def seek_bits(
    model: nn.Module, compression: Compression, wanted: FloatOutputs, data: Calibration, limits: Limits, bar: ProgressBar
) -> None:
    """Let the bits go to where the outputs depend on the weights: the first steps of a training, in which no weight moves."""
    quantize_in_eval(model, compression)
    steps = compression.config.sensitivity_step or 0
    bar.stage("sensitivity", steps)
    optimizer = torch.optim.SGD(compression.logits, lr=_NO_MOVE)
    examples = data.cycle()
    while (done := compression.known.steps) < steps:
        if _LEAST_STEPS <= done < steps - 1 and limits.share > _SENSITIVITY_SHARE:
            compression.note(steps=steps - 1)  # the next one is the last
        example = next(examples)
        model.zero_grad()
        distance = wanted.distance(model, example)
        if not distance.requires_grad:
            raise PreparationError(
                f"{CALLER}: no gradient comes from the outputs to the quantized weights, and it tells where the bits go. "
                "Look for no_grad, detach or a rounding in the model's forward."
            )
        distance.backward()
        optimizer.step()
        bar.advance()
    model.zero_grad()


def _notes(data: Calibration, wanted: FloatOutputs, tuned: Tuned) -> tuple[str, ...]:
    if data.held_out is data.tuned_on:
        batches = "1 batch, none held out"
    else:
        batches = f"{len(data.tuned_on)} batches and {len(data.held_out)} held out"
    return (
        f"compressed by {batches}, {wanted.description}: "
        f"{tuned.before:.4g} after rounding, {tuned.after:.4g} after {tuned.steps} steps of distillation"
        + f", which then diverged ({tuned.diverged}): the best state before is kept"
        * bool(tuned.diverged),
    )
