"""prepare: float model in, the same model with a quantizer between every weight and what reads it out."""

import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.budget.size import mib
from diffq_fx.capture.copies import copy_sharing_parameters, passing_copy
from diffq_fx.capture.gate import Reference, check_faithful, unrepeatable
from diffq_fx.capture.readers import find_readers
from diffq_fx.capture.scope import TakenOver, take_over, takeovers
from diffq_fx.capture.whole_graph import capture_model
from diffq_fx.capture.width_sets import note_width_sets
from diffq_fx.compression import Compression
from diffq_fx.errors import CaptureError, DiffQWarning, PreparationError
from diffq_fx.example import Example
from diffq_fx.hub import tell_libraries
from diffq_fx.methods.base import Method, Place, WeightQuantizer
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.parts import CHILD
from diffq_fx.passes.annotate_weights import META_KEY, annotate_weights
from diffq_fx.passes.quantizer_nodes import insert_quantizers, verify_prepared
from diffq_fx.passes.runner import run_passes
from diffq_fx.selection import Selection, select_weights
from diffq_fx.threads import TRACING
from diffq_fx.training import phases, steps  # noqa: F401  from now on optimizers tell of their steps
from diffq_fx.unfit import refuse_unfit, refuse_unfit_names
from diffq_fx.weights import QUANTIZER_SUFFIX, owner_of

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
        scope: "model" traces the whole model into one fx graph, which runs until Python changes what it was made from (a hook on a layer,
            an attribute, what it holds, a class), but keeps what the forward read of globals; "module" lets every
            module run its own Python, in which those that read weights find the quantized ones; "auto" takes the first where it is
            faithful. ``model.compression`` says which and why.

    Returns:
        The prepared model, of the model's own class; in model scope a GraphModule too.

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
    return prepare_as("prepare_diffq", model, example_inputs, config or DiffQConfig(), scope)


def prepare(model: nn.Module, example_inputs: Any, method: Method | Mapping[str, Method], *, scope: Scope = "auto") -> nn.Module:
    """Put a method's quantizer on every weight of a model; :func:`prepare_diffq` says what is shared and what is raised.

    Args:
        model: a float model.
        example_inputs: what the model is called with.
        method: a config of :mod:`diffq_fx.methods`, or a mapping of patterns of state_dict names to configs, of which the first that
            matches decides; what no pattern matches stays in float.
        scope: "auto", "model" or "module".

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
    return prepare_as("prepare", model, example_inputs, method, scope)


def prepare_as(caller: str, model: nn.Module, example_inputs: Any, method: Method | Mapping[str, Method], scope: Scope) -> nn.Module:
    """Prepare for the public function ``caller``, whose name stands in messages."""
    with TRACING, torch.inference_mode(False), torch.enable_grad():  # a forward may be tried and traced wherever prepare is called
        choice = MethodChoice.of(method, caller)
        if scope not in ("auto", *_WAYS):
            raise ValueError(f'{caller}: scope must be "auto", "model" or "module", got {scope!r}.')
        refuse_unfit(model, caller)
        example = Example.of(example_inputs)
        selection = select_weights(model, choice, caller)
        refuse_unfit_names(model, selection, caller)
        expected = _reference(model, example, caller)
        note_width_sets(model, example, selection, caller)
        prepared = _first_faithful(model, example, selection, choice, expected, scope, caller)
        compression = prepared.__dict__[CHILD]
        _check_target(compression, caller)
    tell_libraries(prepared)
    if compression.notes:
        warnings.warn(f"{caller}: " + " ".join(compression.notes), DiffQWarning, stacklevel=3)
    return prepared


def _reference(model: nn.Module, example: Example, caller: str) -> Reference:
    """What the original does, run on a copy; whatever it raises is the example's fault."""
    with ExitStack() as stack:
        try:
            twin = stack.enter_context(passing_copy(model))
        except Exception as err:  # any object in the model may refuse to be copied
            raise PreparationError(
                f"{caller}: the {type(model).__name__} cannot be copied: {type(err).__name__}: {err}\n"
                "  An attribute of the model is in the way of copy.deepcopy(model)."
            ) from err
        try:
            return Reference(model, twin, example)
        except Exception as err:  # the user's forward may raise anything
            raise ValueError(
                f"{caller}: the model does not run on example_inputs ({example}).\n  {type(err).__name__}: {err}\n  Give what the model"
                " is called with: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device."
            ) from err


def _first_faithful(
    model: nn.Module, example: Example, selection: Selection, choice: MethodChoice, expected: Reference, scope: Scope, caller: str
) -> nn.Module:
    """Try the ways to capture; the first that passes the gate is taken."""
    reasons: list[str] = []
    for name in _WAYS if scope == "auto" else (scope,):
        own = replace(selection, specs=dict(selection.specs), skipped=list(selection.skipped))
        try:
            prepared = _WAYS[name](model, example, own, choice)
            compression = prepared.__dict__[CHILD]
            check_faithful(prepared, compression.quantizers, example, expected)
        except CaptureError as err:
            reasons.append(f"{name} scope: {err}")
            continue
        compression.scope, compression.scope_reason = name, "; ".join(reasons) or "asked for" * (scope != "auto")
        return prepared
    if unsteady := unrepeatable(model, example, expected):
        reasons.append(f"the original model itself gives another result when it runs again from the same seed ({unsteady})")
    raise CaptureError(f"{caller}: the {type(model).__name__} cannot be captured faithfully:\n  " + "\n  ".join(reasons))


def _prepare_model_scope(model: nn.Module, example: Example, selection: Selection, choice: MethodChoice) -> nn.Module:
    def add_quantizers(captured: fx.GraphModule) -> PassResult:
        read = {node.meta[META_KEY].name for node in captured.graph.nodes if META_KEY in node.meta}
        if unread := [spec.name for spec in selection.specs.values() if spec.name not in read]:
            raise CaptureError(f"the example's graph does not read {', '.join(unread)}")
        _add_quantizers(captured, selection, choice)
        return PassResult(captured, False)

    passes = [partial(annotate_weights, selection=selection), add_quantizers, insert_quantizers, verify_prepared]
    return run_passes(capture_model(model, example, selection), passes)


def _prepare_module_scope(model: nn.Module, example: Example, selection: Selection, choice: MethodChoice) -> nn.Module:
    with passing_copy(model) as twin:
        readers, unseen = find_readers(twin, example, selection)
    private = copy_sharing_parameters(model)
    for path, taken_over in ({"": TakenOver()} | takeovers(private, readers, selection.names())).items():
        take_over(private.get_submodule(path), taken_over)
    compression = _add_quantizers(private, selection, choice)
    if unseen:
        compression.notes = (
            f"the example never read {', '.join(unseen)}; their noise is put where the weights are kept. "
            "If another module reads them directly, give an example that does.",
        )
    return private


_WAYS = {"model": _prepare_model_scope, "module": _prepare_module_scope}
"""From the most to the least explicit."""


def _add_quantizers(model: nn.Module, selection: Selection, choice: MethodChoice) -> Compression:
    """Register one quantizer per weight beside it; make the handle and let the model show it.

    The quantizer of a tied weight is a child of the first module that holds the weight, and an attribute of the others: as a child of all
    it would have several names in a state_dict, where torch.distributed.checkpoint knows one.

    The first quantizer has it as a child, not the model: a model that runs all its children, as nn.Sequential does, must not meet one more.
    """
    quantizers: list[WeightQuantizer] = []
    for key, spec in selection.specs.items():
        quantizer = selection.methods[key].make_quantizer(spec, selection.parameters[key])
        quantizer.place = _place_of(model, spec.name)
        for name in spec.names:
            owner, attribute = owner_of(model, name)
            kept = owner._modules if name == spec.name else vars(owner)
            if attribute + QUANTIZER_SUFFIX not in owner._modules:
                kept[attribute + QUANTIZER_SUFFIX] = quantizer
        quantizers.append(quantizer)
    compression = Compression(choice, quantizers, selection.skipped, _rest_of(model, selection, quantizers))
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


def _rest_of(model: nn.Module, selection: Selection, quantizers: list[WeightQuantizer]) -> list[Place]:
    """Where the parameters and buffers are that stay as they are and belong to the model's state, each once."""
    known = {id(selection.parameters[key]) for key in selection.specs}
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


def _what_moves_sizes(compression: Compression) -> str:
    runtimes = {each.runtime: None for each in compression.method.methods if isinstance(each, DiffQConfig) and each.runtime is not None}
    if runtimes:
        return f"They are those of {' and '.join(map(repr, runtimes))}, for its widths and the inputs that share a scale (range_per)."
    return "Of a DiffQConfig, min_bits, max_bits and larger groups (group_size, range_per) move them."


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
        rest = compression.rest_bits + compression.fixed_bits()
        asked, unit = f"target_mib={config.target_mib}", f"MiB, scales included, and {mib(rest):.4g} MiB for the rest"
        if compression.skipped:
            most = max(compression.skipped, key=lambda each: math.prod(each.shape))
            unit += f" (the largest is {most.name} {most.shape}: {most.reason})"
        low, high = (mib(size + rest) for size in (smallest, largest))
    else:
        asked, unit = f"target_bits={config.target_bits}", "bits a weight, scales included"
        low, high = smallest / weights, largest / weights
    widths = " and ".join(f"from {each.limits.min_bits:g} to {each.limits.max_bits:g}" for each in compression.groups().alike)
    raise ValueError(
        f"{caller}: {asked} cannot be reached with widths {widths} bits: the {weights} weights take"
        f" from {low:.4g} to {high:.4g} {unit}.\n"
        f"  Give a target between these. {_what_moves_sizes(compression)}"
    )
