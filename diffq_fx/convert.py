"""convert: a prepared model in, the same model with integer weights and real rounding out."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import nn

from diffq_fx import kernels
from diffq_fx.capture.calls import copy_replacing
from diffq_fx.capture.model_scope import CapturedModel
from diffq_fx.capture.scopes import ScopedModule, answer_for_stored_weights, install_graph, scope_graph
from diffq_fx.capture.swapping import owner_of
from diffq_fx.compression import Compression
from diffq_fx.errors import ConversionError, DiffQWarning
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.parts import CHILD, parts_of, unwrapped
from diffq_fx.passes._graph import QUANTIZER_SUFFIX, STORED_SUFFIX, module_of
from diffq_fx.passes.replace_quantizers import replace_quantizers
from diffq_fx.passes.runner import run_passes
from diffq_fx.passes.verify import verify_converted
from diffq_fx.sharded import is_sharded
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import SkippedWeight, not_finite


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
        The converted model in eval mode: a GraphModule in model scope, else of the model's own class.

    Raises:
        ConversionError: the model was never prepared, or is converted already.

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
    return convert(model, caller="convert_diffq")


def convert(model: nn.Module, *, caller: str = "convert") -> nn.Module:
    """Round every weight of a prepared model for good, each as its method stores it; the general :func:`convert_diffq`.

    Args:
        model: from :func:`~diffq_fx.prepare`, trained; or a module that holds prepared ones, such as a DistributedDataParallel
            (which is taken off) or a LightningModule (which is copied, with its prepared parts converted).
        caller: the name to use in messages.

    Returns:
        The converted model in eval mode; it computes exactly what the prepared model computes in eval().

    Raises:
        ConversionError: the model was never prepared, or is converted already.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import STE
        >>> prepared = prepare(torch.nn.Linear(32, 32), torch.zeros(1, 32), STE(bits=4))
        >>> convert(prepared).weight_quantized
        IntegerWeight('weight', shape=(32, 32), container_bits=4)
    """
    model = unwrapped(model)
    parts = _prepared_parts(model, caller)
    converted: dict[int, nn.Module] = {}
    for part in parts.values():
        converted[id(part)] = _convert_part(part, vars(part)[CHILD], caller)
    if id(model) in converted:
        return converted[id(model)]
    try:
        return copy_replacing(model, converted).eval()
    except Exception as error:  # any object that the model holds may refuse to be copied
        raise ConversionError(
            f"{caller}: the {type(model).__name__} cannot be copied: {type(error).__name__}: {error}\n"
            f"  Convert its prepared parts by themselves: {', '.join(parts)}."
        ) from error


def _convert_part(root: nn.Module, compression: Compression, caller: str) -> nn.Module:
    if sharded := [quantizer.spec.name for quantizer in compression.quantizers if is_sharded(quantizer.weight)]:
        raise ConversionError(
            f"{caller}: weight {sharded[0]!r} is sharded over ranks.\n"
            "  Gather the state (get_model_state_dict of torch.distributed.checkpoint.state_dict, with full_state_dict=True), load it into "
            "a prepared model that is not sharded, and convert that."
        )
    if compression.learned:
        _warn_untrained(compression, caller)
    with torch.no_grad():
        compression.allocate()
        weights = {quantizer.spec.name: root.get_parameter(quantizer.spec.name) for quantizer in compression.quantizers}
        stored = {q.spec.name: _stored(q, weights[q.spec.name], caller) for q in compression.quantizers}
        kernels.release()
    converted = copy_replacing(root, {id(weight): nn.Parameter(torch.empty_like(weight, device="meta")) for weight in weights.values()})
    if isinstance(converted, CapturedModel):
        _convert_model_scope(converted, stored)
    else:
        _convert_module_scope(converted, stored)
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


def _stored(quantizer: WeightQuantizer, weight: nn.Parameter, caller: str) -> StoredWeight:
    """The stored weight, checked to be the one that eval() computes with."""
    if where := not_finite(weight):
        raise ConversionError(f"{caller}: weight {quantizer.spec.name!r} {where}: its training diverged. Load an earlier state.")
    stored = quantizer.store(weight.detach())
    stored.spec = replace(stored.spec, dtype=weight.dtype)  # the model may have gone to another type since it was prepared
    if not torch.equal(stored(), quantizer.rounded_weight(weight.detach())):
        raise ConversionError(f"{caller}: stored weight {quantizer.spec.name!r} differs from the rounded one of eval().")
    return stored


def _register_stored(model: nn.Module, stored: dict[str, StoredWeight]) -> list[tuple[nn.Module, str]]:
    """Put the stored weights beside the weights, under every name; returns where."""
    places = []
    for weight in stored.values():
        for name in weight.spec.names:
            owner, attribute = owner_of(model, name)
            owner.add_module(attribute + STORED_SUFFIX, weight)
            places.append((owner, attribute))
    return places


def _drop_floats(places: list[tuple[nn.Module, str]]) -> None:
    """Remove the float weights and their quantizers; an RNN also keeps its weights in a list."""
    for owner, attribute in places:
        owner._parameters.pop(attribute, None)
        owner._modules.pop(attribute + QUANTIZER_SUFFIX, None)
        if isinstance(owner, nn.RNNBase):
            owner._flat_weights = [owner._parameters.get(name) for name in owner._flat_weights_names]
            owner._flat_weight_refs = [None] * len(owner._flat_weights)


def _convert_model_scope(converted: CapturedModel, stored: dict[str, StoredWeight]) -> None:
    places = _register_stored(converted, stored)
    run_passes(converted, [replace_quantizers, verify_converted])
    _drop_floats(places)


def _convert_module_scope(converted: nn.Module, stored: dict[str, StoredWeight]) -> None:
    scopes = [m for m in converted.modules() if isinstance(m, ScopedModule) and m.scope_kind in ("own forward", "weights")]
    graphs = [scope_graph(module) for module in scopes]
    places = _register_stored(converted, stored)
    for module, gm in zip(scopes, graphs, strict=True):
        for node in gm.graph.nodes:
            target = str(node.target)
            if node.op == "call_module" and target.endswith(QUANTIZER_SUFFIX) and module_of(gm, node) is not None:
                name = target.removesuffix(QUANTIZER_SUFFIX) + STORED_SUFFIX
                gm.add_submodule(name, module.get_submodule(name))
        run_passes(gm, [replace_quantizers, verify_converted])
        install_graph(module, module.scope_kind, gm)
    _drop_floats(places)
    for owner, _ in places:
        answer_for_stored_weights(owner)


def _round_rest_to_half(model: nn.Module) -> None:
    """Give the parameters that are not quantized values that float16 holds; exporters then store them as such."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                parameter.copy_(parameter.half().float())
