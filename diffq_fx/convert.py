"""convert: a prepared model in, the same model with integer weights and real rounding out."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from diffq_fx import kernels
from diffq_fx.capture.copies import copy_replacing
from diffq_fx.capture.scope import ScopedModule, tied_since
from diffq_fx.capture.whole_graph import CapturedModel
from diffq_fx.compression import Compression
from diffq_fx.errors import ConversionError, DiffQWarning, PreparationError
from diffq_fx.hub import tell_libraries
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.methods.grid import GridQuantizer
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.parts import CHILD, parts_of, unwrapped
from diffq_fx.passes.quantizer_nodes import replace_quantizers, verify_converted
from diffq_fx.passes.runner import run_passes
from diffq_fx.sharded import is_sharded
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.training.steps import NO_OPTIMIZER, NOT_TRAINED
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX, SkippedWeight, owner_of

_FAR_OFF, _TIMES_THE_BEST = 0.25, 2.0
"""By how much of its norm rounding with a learned range changes a weight, and how many times what a range of least error does, where the
weight is not that which was trained."""


@dataclass(frozen=True)
class CompressionRecord:
    """What a converted model remembers of its compression; it holds it as ``model.compression``."""

    method: MethodChoice
    skipped: tuple[SkippedWeight, ...]
    scope: str
    scope_reason: str
    notes: tuple[str, ...]
    """What prepare and compress have to say."""
    rest_numel: int
    steps: int
    """Optimizer steps that the bits have made."""
    lambda_per_bit: float | None
    """Loss that the last bit of size was worth at the end of training; None without a target."""
    allocation: str
    """Which widths became final in training, in words; empty where none did."""
    in_noise: bool
    """Whether the training ended before the bits were final, so that the weights never trained with true rounding."""
    sensitivity: dict[str, float]
    """Name of a weight -> the bits that the first steps showed it to need, but for a constant."""
    curves: dict[str, list[list[float]]]
    """What was logged in training: name -> ``[step, value]`` of up to 256 steps."""


def convert(model: nn.Module) -> nn.Module:
    """Round every weight of a prepared model for good, each as its method stores it.

    The result computes exactly what the prepared model computes in eval(). It holds no float copy of a quantized weight, and shares nothing
    with the prepared model, which stays usable.

    Args:
        model: from :func:`~diffq_fx.prepare`, trained; or a module that holds prepared ones, such as a DistributedDataParallel
            (which is taken off) or a LightningModule (which is copied, with its prepared parts converted).

    Returns:
        The converted model in eval mode, of the class of the prepared one.

    Raises:
        ConversionError: the model was never prepared, is converted already, or is not the one that was prepared any more.
        DivergenceError: a weight, or a parameter of its quantizer, is not finite.

    Warns:
        DiffQWarning: the bits were never trained, or no pressure on the size ever reached them.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import STE
        >>> prepared = prepare(torch.nn.Linear(32, 32), torch.zeros(1, 32), STE(bits=4))
        >>> convert(prepared).weight_quantized
        IntegerWeight('weight', shape=(32, 32), container_bits=4)
    """
    model = unwrapped(model)
    parts = _prepared_parts(model)
    for part in parts.values():  # all, before the first is converted
        _refuse_wrapped_layers(part)
    names = {path: _names_now(part, vars(part)[CHILD]) for path, part in parts.items()}
    converted: dict[int, nn.Module] = {}
    for path, part in parts.items():
        converted[id(part)] = _convert_part(part, vars(part)[CHILD], names[path])
    try:
        result = converted[id(model)] if id(model) in converted else copy_replacing(model, converted).eval()
    except Exception as error:  # any object that the model holds may refuse to be copied
        raise ConversionError(
            f"convert: the {type(model).__name__} cannot be copied: {type(error).__name__}: {error}\n"
            f"  Convert its prepared parts by themselves: {', '.join(parts)}."
        ) from error
    tell_libraries(result)
    return result


convert_diffq = convert
"""The same, beside :func:`~diffq_fx.prepare_diffq`."""


def _convert_part(root: nn.Module, compression: Compression, names: dict[int, tuple[str, ...]]) -> nn.Module:
    if sharded := [quantizer.spec.name for quantizer in compression.quantizers if is_sharded(quantizer.weight)]:
        raise ConversionError(
            f"convert: weight {sharded[0]!r} is sharded over ranks.\n"
            "  Gather the state (get_model_state_dict of torch.distributed.checkpoint.state_dict, with full_state_dict=True), load it into "
            "a prepared model that is not sharded, and convert that."
        )
    if compression.learned:
        _warn_untrained(compression)
    with torch.no_grad():
        weights = {id(q): root.get_parameter(names[id(q)][0]) for q in compression.quantizers}
        for quantizer in compression.quantizers:
            quantizer.refuse_not_finite(weights[id(quantizer)])
        compression.allocate()
        stored = [_stored(q, weights[id(q)], names[id(q)]) for q in compression.quantizers]
        _warn_of_ranges(compression.quantizers, weights, stored)
        kernels.release()
    empty = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta")) for weight in weights.values()}
    try:
        converted = copy_replacing(root, empty)
    except PreparationError as error:
        raise ConversionError(f"convert: {error}") from error
    _take_off_wrapper(root, converted)
    _put_in_stored(converted, stored)
    kept = {each.name: getattr(compression, each.name) for each in fields(CompressionRecord)}
    if compression.learned and not int(compression.steps):
        kept["notes"] += (NOT_TRAINED,)
    worth = None if compression.lambda_per_bit is None else float(compression.lambda_per_bit)
    object.__setattr__(converted, CHILD, CompressionRecord(**{**kept, "steps": int(compression.steps), "lambda_per_bit": worth}))
    if compression.method.rest_dtype == "float16":
        _round_rest_to_half(converted)
    return converted.eval()


def _prepared_parts(model: nn.Module) -> Mapping[str, nn.Module]:
    """The modules that were prepared: the model itself, or those that it holds."""
    if parts := parts_of(model, Compression):
        return parts
    if any(isinstance(module, WeightQuantizer) for module in model.modules()):
        raise ConversionError(
            f"convert: the {type(model).__name__} is a part of a prepared model. Give the whole, as prepare returned it; "
            "what was merged or wrapped inside it is converted with it."
        )
    if any(isinstance(module, StoredWeight) for module in model.modules()):
        raise ConversionError(f"convert: the {type(model).__name__} is converted already.")
    raise ConversionError(
        f"convert: the {type(model).__name__} was never prepared. Call prepare_diffq(model, example_inputs), or prepare with another "
        "method, and train the result first."
    )


def _names_now(root: nn.Module, compression: Compression) -> dict[int, tuple[str, ...]]:
    """Where the weight of each quantizer is now, by the quantizer's identity: layers may have been moved since the model was prepared."""
    names: dict[int, tuple[str, ...]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        for attribute, held in (*module._modules.items(), *vars(module).items()):
            if isinstance(held, WeightQuantizer) and attribute.endswith(QUANTIZER_SUFFIX):
                name = f"{path}.{attribute}".removeprefix(".").removesuffix(QUANTIZER_SUFFIX)
                names[id(held)] = (*names.get(id(held), ()), name)
    if tied := tied_since(root):
        raise ConversionError(f"convert: {tied}.\n  Tie the weights of the float model, and prepare and train it then.")
    lost = []
    for quantizer in compression.quantizers:
        spec, found = quantizer.spec, [_parameter_at(root, name) for name in names.get(id(quantizer), ())]
        if not found:
            lost.append(f"{spec.name!r} is gone: the layer that held it was replaced")
        elif any(each is None for each in found):
            lost.append(f"{names[id(quantizer)][0]!r} is no parameter any more: something else makes it now")
        elif any(tuple(each.shape) != spec.shape for each in found if each is not None):
            lost.append(f"{spec.name!r} had shape {spec.shape} and has {tuple(found[0].shape) if found[0] is not None else ''} now")
    if lost:
        raise ConversionError(
            f"convert: the {type(root).__name__} is not the model that was prepared any more: weight {'; weight '.join(lost)}.\n"
            "  Convert before the layers are changed, or change the float model first, and prepare and train it then."
        )
    return names


def _parameter_at(root: nn.Module, name: str) -> nn.Parameter | None:
    owner, attribute = owner_of(root, name)
    return owner._parameters.get(attribute)


def _warn_untrained(compression: Compression) -> None:
    if not int(compression.steps):
        _warn(
            f"the bits never moved: no optimizer that holds them has made a step. {NO_OPTIMIZER} "
            "A copy with averaged parameters needs the buffers of the model that trained, too."
        )
        return
    if (share := float(compression.bits_frozen)) and not compression.frozen:
        _warn(
            f"the model is an average, {1 - share:.0%} of it from the noise phase: its widths and ranges are found anew, and not those "
            "that training ended with. Average over fewer steps, or begin the average once the bits are final (model.compression.frozen)."
        )
    if compression.in_noise:
        steps, final = compression.known.steps, compression.config.freeze_step
        _warn(
            f"the training ended in the noise phase, after step {steps}; the bits become final after step {final}, and weights train with "
            f"true rounding from then on. Prepare with training_steps={steps}, the length of the training, and train again; or train on."
        )
    if not compression.config.has_target and compression.config.penalty is None and not compression.penalized:
        _warn(
            "no pressure on the size ever reached this model: the config has no target and no penalty, and model_size(model) was "
            "never part of a loss. Set target_bits, target_mib or penalty, or add penalty * model_size(model) to the loss."
        )


def _warn_of_ranges(quantizers: Iterable[WeightQuantizer], weights: Mapping[int, nn.Parameter], stored: Iterable[StoredWeight]) -> None:
    """Name weights that trained, are frozen now as PEFT leaves them, and are far from what their learned ranges hold."""
    found = []
    for quantizer, made in zip(quantizers, stored, strict=True):
        weight = weights[id(quantizer)]
        if quantizer.learned_for is None or bool(quantizer.learned_for.any()) or weight.requires_grad:
            continue  # no learned range, or one that is_learned_for_another() looks at, or no merge since the weight trained
        if (off := _distance(made(), weight)) < _FAR_OFF:
            continue
        if off > _TIMES_THE_BEST * (best := _distance(quantizer.rounded_anew(weight), weight)):
            found.append(f"{made.spec.name!r} by {off:.0%} of its norm, and by {best:.0%} with a range that is sought for it")
    if found:
        _warn(
            f"learned ranges do not fit {len(found)} of the weights, as after an adapter was merged into weights that had trained: "
            f"rounding changes {found[0]}. Merge adapters into the float model, and prepare and train that."
        )


def _distance(rounded: Tensor, weight: Tensor) -> float:
    return float((rounded.float() - weight.float()).norm() / weight.float().norm().clamp(min=torch.finfo(torch.float32).tiny))


def _warn(message: str) -> None:
    warnings.warn(f"convert: {message}", DiffQWarning, stacklevel=5)  # the line that calls convert


def _stored(quantizer: WeightQuantizer, weight: nn.Parameter, names: tuple[str, ...]) -> StoredWeight:
    """The stored weight, checked to be the one that eval() computes with."""
    stored = quantizer.store(weight.detach()).to(weight.dtype)  # which, as its names, may have changed since the model was prepared
    name, *aliases = names
    stored.spec = replace(stored.spec, name=name, aliases=tuple(aliases))
    if isinstance(quantizer, GridQuantizer) and isinstance(stored, IntegerWeight):  # on the same grid: the search for it is not made twice
        rounded = quantizer.round_to(weight.detach(), stored.params)
    else:
        rounded = quantizer.rounded_weight(weight.detach())
    if not torch.equal(stored(), rounded):
        raise ConversionError(f"convert: stored weight {quantizer.spec.name!r} differs from the rounded one of eval().")
    return stored


def _put_in_stored(converted: nn.Module, stored: Iterable[StoredWeight]) -> None:
    """Put the stored weights where the weights and their quantizers are, under every name."""
    places = [(*owner_of(converted, name), weight) for weight in stored for name in weight.spec.names]
    for owner, attribute, weight in places:
        owner._modules[attribute + STORED_SUFFIX] = weight
    if isinstance(converted, CapturedModel) and converted.uses_graph:
        run_passes(converted, [replace_quantizers, verify_converted])
    for owner, attribute, _ in places:
        owner._parameters.pop(attribute, None)
        for registry in (owner._modules, vars(owner)):
            registry.pop(attribute + QUANTIZER_SUFFIX, None)
        if isinstance(owner, nn.RNNBase):
            owner._flat_weight_refs = [None] * len(owner._flat_weights_names)


def _take_off_wrapper(root: nn.Module, converted: nn.Module) -> None:
    """Leave out a forward that was set on the prepared model's instance: it calls the prepared model, and not the converted one."""
    if "forward" not in vars(root):
        return
    for name in ("forward", "_original_forward"):  # accelerate keeps the second
        vars(converted).pop(name, None)
    _warn(
        f"the forward that was set on the {type(root).__name__} itself, as accelerate and transformers' Trainer do for mixed "
        "precision, is not part of the converted model, which computes in the type of its weights."
    )


def _refuse_wrapped_layers(root: nn.Module) -> None:
    for path, module in root.named_modules():
        if module is not root and isinstance(module, ScopedModule) and "forward" in vars(module):
            raise ConversionError(
                f"convert: the forward of layer {path!r} was set after prepare, and a converted layer would call the prepared one by it.\n"
                f"  Take it off (del model.{path}.forward), or set it on the float model before prepare."
            )


def _round_rest_to_half(model: nn.Module) -> None:
    """Give the parameters that are not quantized values that float16 holds; exporters then store them as such."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                parameter.copy_(parameter.half().float())
