"""prepare: float model in, the same model with a quantizer between every weight and what reads it out."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from diffq_fx.budget.size import mib
from diffq_fx.capture.calls import ExampleCall, copy_sharing_parameters
from diffq_fx.capture.gate import Reference, check_faithful, unrepeatable
from diffq_fx.capture.model_scope import capture_model
from diffq_fx.capture.module_scope import ModuleScope, capture_modules
from diffq_fx.capture.plan import WeightPlan, plan_weights
from diffq_fx.capture.scopes import install_graph
from diffq_fx.capture.swapping import owner_of
from diffq_fx.compression import Compression, find_compressions
from diffq_fx.errors import CaptureError, DiffQWarning, PreparationError
from diffq_fx.methods.base import Method, Place, WeightQuantizer
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.parts import CHILD
from diffq_fx.passes._graph import QUANTIZER_SUFFIX
from diffq_fx.passes.annotate_weights import META_KEY, annotate_weights
from diffq_fx.passes.insert_quantizers import insert_quantizers
from diffq_fx.passes.runner import run_passes
from diffq_fx.passes.verify import verify_prepared
from diffq_fx.storage import StoredWeight
from diffq_fx.training import phases, steps  # noqa: F401  from now on optimizers tell of their steps

Scope = Literal["auto", "model", "module"]

_HELD = "model_compression"


def prepare_diffq(model: nn.Module, example_inputs: Any, config: DiffQConfig | None = None, *, scope: Scope = "auto") -> nn.Module:
    """Put pseudo quantization noise with a trainable number of bits on every weight of a model, DiffQ (arXiv:2104.09987).

    In train() every weight w is read as ``w + step(b) * n``, in eval() as its truly rounded value. Train the result as you
    trained the model: any optimizer over its ``parameters()``, the loop as it is. With a target in the config the size is held by itself.

    The prepared model *shares its Parameters* with the model: training one trains the other, and no second copy of the
    weights is held. Modules and buffers are copies; the model itself is left as it was.

    Args:
        model: a float model.
        example_inputs: what the model is called with: a tensor, a tuple of positional or a dict of keyword arguments. The example is run
            through the original and the prepared model in train and eval mode, and both must agree bit by bit with the noise off.
        config: the settings; by default 4 bits a weight.
        scope: "model" traces the whole model into one fx graph; "module" rewrites only the modules that read weights and keeps the class,
            methods and signature of the model; "auto" takes the first where it is faithful. ``model.compression`` says which and why.

    Returns:
        The prepared model; a GraphModule in model scope, else of the model's own class.

    Raises:
        PreparationError: there is no weight to quantize, one is not finite, or the model is prepared already.
        ValueError: the example does not run, an exclude pattern matches nothing, or the target cannot be reached.
        CaptureError: the model's result would change, or a weight would be read past its noise.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> prepared = prepare_diffq(model, torch.zeros(1, 8), DiffQConfig(target_bits=8, max_bits=10))
        >>> [node.name for node in prepared.graph.nodes if "quantizer" in node.name]
        ['_0_weight_quantizer', '_2_weight_quantizer']
    """
    return prepare(model, example_inputs, config or DiffQConfig(), scope=scope, caller="prepare_diffq")


def prepare(
    model: nn.Module,
    example_inputs: Any,
    method: Method | Mapping[str, Method],
    *,
    scope: Scope = "auto",
    caller: str = "prepare",
) -> nn.Module:
    """Put a method's quantizer on every weight of a model; :func:`prepare_diffq` says what is shared and what is raised.

    Args:
        model: a float model.
        example_inputs: what the model is called with.
        method: a config of :mod:`diffq_fx.methods`, or a mapping of patterns of state_dict names to configs, of which the first that
            matches decides; what no pattern matches stays in float.
        scope: "auto", "model" or "module".
        caller: the name to use in messages.

    Returns:
        The prepared model.

    Raises:
        PreparationError: as for :func:`prepare_diffq`; a method cannot quantize a weight that it was asked to.
        ValueError: as for :func:`prepare_diffq`; a pattern matches nothing.
        TypeError: ``method`` is neither a method nor a mapping to methods.

    Example:
        >>> import torch
        >>> from diffq_fx.methods import LSQ
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> prepared = prepare(net, torch.zeros(1, 32), {"0": LSQ(bits=3), "*": DiffQConfig(target_bits=6)})
        >>> [type(quantizer).__name__ for quantizer in prepared.compression.quantizers]
        ['LSQWeight', 'DiffQWeight']
    """
    choice = MethodChoice.of(method, caller)
    _refuse_unfit(model, scope, caller)
    call = ExampleCall.of(example_inputs)
    plan = plan_weights(model, choice, caller)
    with torch.inference_mode(False):  # what is made in that mode could never train
        expected = _reference(model, call, caller)
        prepared, compression = _first_faithful(model, call, plan, choice, expected, scope, caller)
    _check_target(compression, caller)
    if compression.notes:
        warnings.warn(f"{caller}: " + " ".join(compression.notes), DiffQWarning, stacklevel=3)
    return prepared


def _refuse_unfit(model: nn.Module, scope: str, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}.")
    if scope not in ("auto", "model", "module"):
        raise ValueError(f'{caller}: scope must be "auto", "model" or "module", got {scope!r}.')
    if find_compressions(model):
        raise PreparationError(f"{caller}: the {type(model).__name__} is prepared already. Train it, or start from the float model.")
    if any(isinstance(module, StoredWeight) for module in model.modules()):
        raise PreparationError(f"{caller}: the {type(model).__name__} is converted: its weights are integers. Start from the float model.")
    made_in_inference = next((name for name, p in model.named_parameters() if not nn.parameter.is_lazy(p) and p.is_inference()), None)
    if made_in_inference is not None:
        raise PreparationError(
            f"{caller}: {made_in_inference!r} was made under torch.inference_mode() and can never train. Make the model outside of it."
        )
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
                raise PreparationError(
                    f"{caller}: {path or 'the model'} makes its {hook.name} in a hook of torch.nn.utils.{kind}, "
                    "where no quantizer can stand.\n"
                    f"  Use torch.nn.utils.parametrizations.{kind}."
                )
    if hasattr(model, CHILD):
        raise PreparationError(f"{caller}: the model has an attribute {CHILD!r} of its own, which a prepared model needs. Rename it.")


def _reference(model: nn.Module, call: ExampleCall, caller: str) -> Reference:
    """What the original does, run on a copy; whatever it raises is the example's fault."""
    try:
        twin = copy_sharing_parameters(model)
    except Exception as err:  # any object in the model may refuse to be copied
        raise PreparationError(
            f"{caller}: the {type(model).__name__} cannot be copied: {type(err).__name__}: {err}\n"
            "  An attribute of the model is in the way of copy.deepcopy(model)."
        ) from err
    try:
        return Reference.of(twin, call)
    except Exception as err:  # the user's forward may raise anything
        given = ", ".join([_described(a) for a in call.args] + [f"{k}={_described(v)}" for k, v in call.kwargs.items()])
        raise ValueError(
            f"{caller}: the model does not run on example_inputs ({given}).\n  {type(err).__name__}: {err}\n"
            "  Give what the model is called with: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device."
        ) from err


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{value.dtype} {tuple(shape)} on {value.device}"


def _first_faithful(
    model: nn.Module, call: ExampleCall, plan: WeightPlan, choice: MethodChoice, expected: Reference, scope: Scope, caller: str
) -> tuple[nn.Module, Compression]:
    """Try the ways to capture from the most to the least explicit; the first that passes the gate is taken."""
    ways = {
        "model": [("model", _prepare_model_scope)],
        "module": [
            ("module", partial(_prepare_module_scope, trace_forwards=True)),
            ("module", partial(_prepare_module_scope, trace_forwards=False)),
        ],
    }
    reasons: list[str] = []
    for name, way in ways.get(scope, ways["model"] + ways["module"]):
        own_plan = WeightPlan(dict(plan.specs), list(plan.skipped), plan.parameters, plan.methods)
        try:
            prepared, compression = way(model, call, own_plan, choice)
            check_faithful(prepared, compression.quantizers, call, expected)
        except CaptureError as err:
            reasons.append(f"{name} scope: {err}")
            continue
        compression.scope, compression.scope_reason = name, "; ".join(reasons) or "asked for" * (scope != "auto")
        return prepared, compression
    unsteady = unrepeatable(copy_sharing_parameters(model), call, expected)
    if unsteady:
        reasons.append(f"the original model itself gives another result when it runs again from the same seed ({unsteady})")
    raise CaptureError(f"{caller}: the {type(model).__name__} cannot be captured faithfully:\n  " + "\n  ".join(reasons))


def _prepare_model_scope(model: nn.Module, call: ExampleCall, plan: WeightPlan, choice: MethodChoice) -> tuple[nn.Module, Compression]:
    captured = capture_model(model, call, plan)
    run_passes(captured, [partial(annotate_weights, plan=plan)])
    read = {node.meta[META_KEY].name for node in captured.graph.nodes if META_KEY in node.meta}
    unread = [spec.name for spec in plan.specs.values() if spec.name not in read]
    if unread:
        raise CaptureError(f"the example's graph does not read {', '.join(unread)}")
    quantizers = _add_quantizers(captured, plan)
    run_passes(captured, [insert_quantizers, verify_prepared])
    return captured, _add_compression(captured, plan, choice, quantizers)


def _prepare_module_scope(
    model: nn.Module, call: ExampleCall, plan: WeightPlan, choice: MethodChoice, *, trace_forwards: bool
) -> tuple[nn.Module, Compression]:
    private, scopes, unseen = capture_modules(model, call, plan, trace_forwards=trace_forwards)
    for each in scopes:
        run_passes(each.graph, [partial(annotate_weights, plan=plan)])
    for key, spec in plan.specs.items():
        plan.specs[key] = replace(spec, consumer=spec.consumer or "nothing in the example")
    quantizers = _add_quantizers(private, plan)
    for each in scopes:
        _rewrite_scope(each)
    compression = _add_compression(private, plan, choice, quantizers)
    if unseen:
        compression.notes = (
            f"the example never read {', '.join(unseen)}; their noise is put where the weights are kept. "
            "If another module reads them directly, give an example that does.",
        )
    return private, compression


def _rewrite_scope(scope: ModuleScope) -> None:
    """Insert the quantizer nodes into one module's graph, and make the graph its forward."""
    weights = []
    for node in scope.graph.graph.nodes:
        if META_KEY in node.meta:
            owner, attribute = owner_of(scope.module, node.target)
            scope.graph.add_submodule(f"{node.target}{QUANTIZER_SUFFIX}", owner.get_submodule(attribute + QUANTIZER_SUFFIX))
            weights.append(node.target)
    gm: fx.GraphModule = run_passes(scope.graph, [insert_quantizers, verify_prepared])
    install_graph(scope.module, scope.kind, gm, tuple(weights))


def _add_quantizers(model: nn.Module, plan: WeightPlan) -> list[WeightQuantizer]:
    """Make one quantizer per weight and register it beside the weight under each of its names."""
    quantizers = []
    for key, spec in plan.specs.items():
        quantizer = plan.methods[key].make_quantizer(spec, plan.parameters[key])
        for name in spec.names:
            owner, attribute = owner_of(model, name)
            owner.add_module(attribute + QUANTIZER_SUFFIX, quantizer)
        quantizers.append(quantizer)
    return quantizers


def _add_compression(model: nn.Module, plan: WeightPlan, choice: MethodChoice, quantizers: list[WeightQuantizer]) -> Compression:
    """Make the handle and let the model show it.

    The first quantizer has it as a child, not the model: a model that runs all its children, as nn.Sequential does, must not meet one more.
    """
    for quantizer in quantizers:
        quantizer.place = _place_of(model, quantizer.spec.name)
    compression = Compression(choice, quantizers, plan.skipped, _rest_of(model, plan, quantizers))
    phases.start(compression)
    quantizers[0].add_module(_HELD, compression)
    object.__setattr__(model, CHILD, compression)
    model.register_load_state_dict_post_hook(_round_what_was_loaded)
    for quantizer in quantizers:
        quantizer.train(model.training)
    return compression


def _round_what_was_loaded(model: nn.Module, _: Any) -> None:
    """A compiled eval() takes the widths as they are."""
    compression = vars(model).get(CHILD)
    if isinstance(compression, Compression) and not model.training:
        compression.eval()


def _rest_of(model: nn.Module, plan: WeightPlan, quantizers: list[WeightQuantizer]) -> list[Place]:
    """Where the parameters and buffers are that stay as they are and belong to the model's state, each once."""
    known = {id(plan.parameters[key]) for key in plan.specs}
    known.update(id(tensor) for quantizer in quantizers for tensor in (*quantizer.parameters(), *quantizer.buffers()))
    kept, places = model.state_dict().keys(), []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and id(tensor) not in known:
            known.add(id(tensor))
            places.append(_place_of(model, name))
    return places


def _place_of(model: nn.Module, name: str) -> Place:
    owner, attribute = owner_of(model, name)
    return (owner._parameters if attribute in owner._parameters else owner._buffers), attribute


def _check_target(compression: Compression, caller: str) -> None:
    """Refuse a target that no choice of widths within the limits reaches."""
    budget = compression.budget_bits()
    if budget is None:
        return
    config, weights = compression.config, compression.groups().num_weights
    smallest, largest = compression.reachable_bits()
    if smallest <= budget - compression.known.bits_saved <= largest:
        return
    if config.target_mib is not None:
        asked, unit = f"target_mib={config.target_mib}", "MiB, scales and what is not quantized included"
        low, high = (mib(size + compression.rest_bits + compression.fixed_bits()) for size in (smallest, largest))
    else:
        asked, unit = f"target_bits={config.target_bits}", "bits a weight, scales included"
        low, high = smallest / weights, largest / weights
    widths = " and ".join(f"from {each.limits.min_bits:g} to {each.limits.max_bits:g}" for each in compression.groups().alike)
    raise ValueError(
        f"{caller}: {asked} cannot be reached with widths {widths} bits: the {weights} weights take"
        f" from {low:.4g} to {high:.4g} {unit}.\n"
        "  Change the target, min_bits or max_bits, or use larger groups (group_size, range_per) for smaller scales."
    )
