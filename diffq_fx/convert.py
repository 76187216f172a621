"""convert: a prepared model in, the same model with integer weights and real rounding out."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from diffq_fx import kernels
from diffq_fx.capture.copies import copy_replacing
from diffq_fx.capture.scope import ScopedModule, tied_since
from diffq_fx.capture.whole_graph import CapturedModel
from diffq_fx.compression import Compression
from diffq_fx.errors import ConversionError, DiffQWarning, DivergenceError
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.parts import CHILD, parts_of, unwrapped
from diffq_fx.passes.quantizer_nodes import replace_quantizers, verify_converted
from diffq_fx.passes.runner import run_passes
from diffq_fx.sharded import is_sharded
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX, SkippedWeight, not_finite, owner_of


@dataclass(frozen=True)
class CompressionRecord:
    """What a converted model remembers of its compression; it holds it as ``model.compression``."""

    method: MethodChoice
    skipped: tuple[SkippedWeight, ...]
    scope: str
    scope_reason: str
    rest_numel: int
    steps: int
    """Optimizer steps that the bits have made."""
    lambda_per_bit: float | None
    """Loss that the last bit of size was worth at the end of training; None without a target."""

    @staticmethod
    def of(compression: Compression) -> "CompressionRecord":
        """What is left of a prepared model's compression."""
        worth = compression.lambda_per_bit
        return CompressionRecord(
            method=compression.method,
            skipped=compression.skipped,
            scope=compression.scope,
            scope_reason=compression.scope_reason,
            rest_numel=compression.rest_numel,
            steps=int(compression.steps),
            lambda_per_bit=None if worth is None else float(worth),
        )


def convert_diffq(model: nn.Module) -> nn.Module:
    """Round every weight of a prepared model for good and keep the integers: ``w = (q - zero_point) * scale``.

    The result computes exactly what the prepared model computes in eval(). It holds no float copy of a quantized weight, and shares nothing
    with the prepared model, which stays usable.

    Args:
        model: from :func:`prepare_diffq`, trained; or a module that holds prepared ones, such as a DistributedDataParallel
            (which is taken off) or a LightningModule (which is copied, with its prepared parts converted).

    Returns:
        The converted model in eval mode, of the class of the prepared one.

    Raises:
        ConversionError: the model was never prepared, or is converted already.
        DivergenceError: what a weight is rounded with is not finite.

    Warns:
        DiffQWarning: the bits were never trained, or no pressure on the size ever reached them.

    Example:
        >>> import warnings
        >>> from diffq_fx import prepare_diffq
        >>> prepared = prepare_diffq(torch.nn.Linear(32, 32), torch.zeros(1, 32))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     converted = convert_diffq(prepared)
        >>> sorted(name for name, _ in converted.named_parameters())
        ['bias']
    """
    return _convert(model, "convert_diffq")


def convert(model: nn.Module) -> nn.Module:
    """Round every weight of a prepared model for good, each as its method stores it; the general :func:`convert_diffq`.

    Args:
        model: from :func:`~diffq_fx.prepare`, trained; or a module that holds prepared ones, such as a DistributedDataParallel
            (which is taken off) or a LightningModule (which is copied, with its prepared parts converted).

    Returns:
        The converted model in eval mode; it computes exactly what the prepared model computes in eval().

    Raises:
        ConversionError: the model was never prepared, or is converted already.
        DivergenceError: what a weight is rounded with is not finite.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import STE
        >>> prepared = prepare(torch.nn.Linear(32, 32), torch.zeros(1, 32), STE(bits=4))
        >>> convert(prepared).weight_quantized
        IntegerWeight('weight', shape=(32, 32), container_bits=4)
    """
    return _convert(model, "convert")


def _convert(model: nn.Module, caller: str) -> nn.Module:
    model = unwrapped(model)
    parts = _prepared_parts(model, caller)
    names = {path: _names_now(part, vars(part)[CHILD], caller) for path, part in parts.items()}  # of all, before the first is converted
    converted: dict[int, nn.Module] = {}
    for path, part in parts.items():
        converted[id(part)] = _convert_part(part, vars(part)[CHILD], names[path], caller)
    if id(model) in converted:
        return converted[id(model)]
    try:
        return copy_replacing(model, converted).eval()
    except Exception as error:  # any object that the model holds may refuse to be copied
        raise ConversionError(
            f"{caller}: the {type(model).__name__} cannot be copied: {type(error).__name__}: {error}\n"
            f"  Convert its prepared parts by themselves: {', '.join(parts)}."
        ) from error


def _convert_part(root: nn.Module, compression: Compression, names: dict[int, tuple[str, ...]], caller: str) -> nn.Module:
    if sharded := [quantizer.spec.name for quantizer in compression.quantizers if is_sharded(quantizer.weight)]:
        raise ConversionError(
            f"{caller}: weight {sharded[0]!r} is sharded over ranks.\n"
            "  Gather the state (get_model_state_dict of torch.distributed.checkpoint.state_dict, with full_state_dict=True), load it into "
            "a prepared model that is not sharded, and convert that."
        )
    _refuse_new_classes(root, caller)
    if compression.learned:
        _warn_untrained(compression, caller)
    with torch.no_grad():
        compression.allocate()
        weights = {id(q): root.get_parameter(names[id(q)][0]) for q in compression.quantizers}
        stored = [_stored(q, weights[id(q)], names[id(q)], caller) for q in compression.quantizers]
        kernels.release()
    converted = copy_replacing(root, {id(weight): nn.Parameter(torch.empty_like(weight, device="meta")) for weight in weights.values()})
    _take_off_wrapper(root, converted, caller)
    _put_in_stored(converted, stored)
    object.__setattr__(converted, CHILD, CompressionRecord.of(compression))
    if compression.method.rest_dtype == "float16":
        _round_rest_to_half(converted)
    return converted.eval()


def _prepared_parts(model: nn.Module, caller: str) -> dict[str, nn.Module]:
    """The modules that were prepared: the model itself, or those that it holds."""
    if parts := parts_of(model, Compression):
        return parts
    if any(isinstance(module, WeightQuantizer) for module in model.modules()):
        raise ConversionError(
            f"{caller}: the {type(model).__name__} is a part of a prepared model. Give the whole, as prepare returned it; "
            "what was merged or wrapped inside it is converted with it."
        )
    if any(isinstance(module, StoredWeight) for module in model.modules()):
        raise ConversionError(f"{caller}: the {type(model).__name__} is converted already.")
    raise ConversionError(
        f"{caller}: the {type(model).__name__} was never prepared. "
        f"Call {caller.replace('convert', 'prepare')}(model, example_inputs) and train the result first."
    )


def _names_now(root: nn.Module, compression: Compression, caller: str) -> dict[int, tuple[str, ...]]:
    """Where the weight of each quantizer is now, by the quantizer's identity: layers may have been moved since the model was prepared."""
    names: dict[int, tuple[str, ...]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, WeightQuantizer) and path.endswith(QUANTIZER_SUFFIX):
            names[id(module)] = (*names.get(id(module), ()), path.removesuffix(QUANTIZER_SUFFIX))
    _refuse_wrapped_layers(root, caller)
    if tied := tied_since(root):
        raise ConversionError(f"{caller}: {tied}.\n  Tie the weights of the float model, and prepare and train it then.")
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
            f"{caller}: the {type(root).__name__} is not the model that was prepared any more: weight {'; weight '.join(lost)}.\n"
            "  Put the layer back that was prepared, or change the float model first, and prepare and train it then."
        )
    return names


def _parameter_at(root: nn.Module, name: str) -> nn.Parameter | None:
    owner, attribute = owner_of(root, name)
    return owner._parameters.get(attribute)


def _warn_untrained(compression: Compression, caller: str) -> None:
    config = compression.config
    aimless = config.target_bits is None and config.target_mib is None and config.penalty is None
    if not int(compression.steps):
        warnings.warn(
            f"{caller}: the bits never moved: no optimizer that holds them has made a step. "
            "Build the optimizer from the prepared model's "
            "parameters(), or add the bits to yours with setup_optimizer(optimizer, model).",
            DiffQWarning,
            stacklevel=5,
        )
    elif aimless and not compression.penalized:
        warnings.warn(
            f"{caller}: no pressure on the size ever reached this model: "
            "the config has no target and no penalty, and model_size(model) was "
            "never part of a loss. Set target_bits, target_mib or penalty, or add penalty * model_size(model) to the loss.",
            DiffQWarning,
            stacklevel=5,
        )


def _stored(quantizer: WeightQuantizer, weight: nn.Parameter, names: tuple[str, ...], caller: str) -> StoredWeight:
    """The stored weight, checked to be the one that eval() computes with."""
    if where := not_finite(weight):
        raise ConversionError(f"{caller}: weight {quantizer.spec.name!r} {where}: its training diverged. Load an earlier state.")
    _refuse_state_that_is_not_finite(quantizer, caller)
    stored = quantizer.store(weight.detach())
    name, *aliases = names
    stored.spec = replace(stored.spec, dtype=weight.dtype, name=name, aliases=tuple(aliases))  # as the model is now
    if not torch.equal(stored(), quantizer.rounded_weight(weight.detach())):
        raise ConversionError(f"{caller}: stored weight {quantizer.spec.name!r} differs from the rounded one of eval().")
    return stored


def _refuse_state_that_is_not_finite(quantizer: WeightQuantizer, caller: str) -> None:
    needed = {id(tensor) for tensor in quantizer.state_tensors()}
    for name, tensor in (*quantizer.named_parameters(), *quantizer.named_buffers()):
        if id(tensor) in needed and (where := not_finite(tensor)):
            message = f"weight {quantizer.spec.name!r}: its {name} {where}: its training diverged. Load an earlier state."
            raise DivergenceError(f"{caller}: {message}")


def _put_in_stored(converted: nn.Module, stored: Iterable[StoredWeight]) -> None:
    """Put the stored weights where the weights and their quantizers are, under every name."""
    places = [(*owner_of(converted, name), weight) for weight in stored for name in weight.spec.names]
    for owner, attribute, weight in places:
        owner._modules[attribute + STORED_SUFFIX] = weight
    if isinstance(converted, CapturedModel) and converted.uses_graph:
        run_passes(converted, [replace_quantizers, verify_converted])
    for owner, attribute, _ in places:
        owner._parameters.pop(attribute, None)
        owner._modules.pop(attribute + QUANTIZER_SUFFIX, None)
        if isinstance(owner, nn.RNNBase):
            owner._flat_weight_refs = [None] * len(owner._flat_weights_names)


def _take_off_wrapper(root: nn.Module, converted: nn.Module, caller: str) -> None:
    """Leave out a forward that was set on the prepared model's instance: it calls the prepared model, and not the converted one."""
    if "forward" not in vars(root):
        return
    for name in ("forward", "_original_forward"):  # accelerate keeps the second
        vars(converted).pop(name, None)
    warnings.warn(
        f"{caller}: the forward that was set on the {type(root).__name__} itself, as accelerate and transformers' Trainer do for mixed "
        "precision, is not part of the converted model, which computes in the type of its weights.",
        DiffQWarning,
        stacklevel=5,
    )


def _refuse_wrapped_layers(root: nn.Module, caller: str) -> None:
    for path, module in root.named_modules():
        if module is not root and isinstance(module, ScopedModule) and "forward" in vars(module):
            raise ConversionError(
                f"{caller}: the forward of layer {path!r} was set after prepare, and a converted layer would call the prepared one by it.\n"
                f"  Take it off (del model.{path}.forward), or set it on the float model before prepare."
            )


def _refuse_new_classes(root: nn.Module, caller: str) -> None:
    """A copy is made of the class that prepare gave, and of torch's own parametrization of it."""
    for path, module in root.named_modules():
        kind = type(module)
        if not isinstance(module, CapturedModel | ScopedModule) or is_parametrized(module):
            continue
        made = kind.__base__ if isinstance(module, CapturedModel) else kind  # fx makes a class for each GraphModule
        if "original_class" not in vars(made):
            where = repr(path) if path else "the model"
            raise ConversionError(
                f"{caller}: the class of {where} was set after prepare, and a converted copy would not have it.\n"
                "  Set it on the float model before prepare, or on the converted model."
            )


def _round_rest_to_half(model: nn.Module) -> None:
    """Give the parameters that are not quantized values that float16 holds; exporters then store them as such."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                parameter.copy_(parameter.half().float())
