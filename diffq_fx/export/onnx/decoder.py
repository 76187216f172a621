"""Decoders of transformers that take and return the tensors of their cache, as optimum and onnxruntime-genai run them."""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.examples import ATTENTION_MASK, CACHE, ExportExample
from diffq_fx.export.onnx.while_traced import forward_as

_CACHED = 2
_FEWEST_TOKENS = 5
"""What is cached of the example and what is new are two tokens or more, and not as many: torch.export takes no dynamic size for 0 and 1."""

_Layers = list[dict[str, Tensor]]


def in_mid_text(model: nn.Module, example: ExportExample) -> ExportExample:
    """A decoder's call with tokens alone as one that has cached the first of them already; with a mask and positions if it takes any.

    Args:
        model: in eval mode.
        example: token ids, and what else has a value for each token.

    Raises:
        ExportError: the model has no cache, or the example does not fit one.
    """
    name, signature = type(model).__name__, inspect.signature(model.forward)
    if CACHE not in signature.parameters:
        advice = "Export its get_base_model(), which has the adapters too" if hasattr(model, "peft_config") else "Leave cache out"
        raise ExportError(f"cache=True, but the {name} has no cache: its forward takes no {CACHE!r}. {advice}.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ExportError(
            f"cache=True, but the {name} has an encoder, whose keys and values no decoder's cache has. Leave cache out, and add "
            "use_cache=False to example_inputs."
        )
    try:
        given = _by_name(signature, example)
    except TypeError as error:
        raise ExportError(f"the {name} does not take example_inputs: {error}.") from error
    of_tokens = _values_of_tokens(given)
    ids = of_tokens["input_ids"]
    if ATTENTION_MASK in signature.parameters:
        mask = of_tokens.get(ATTENTION_MASK, torch.ones_like(ids)).clone()
        mask[:, _CACHED - 1 :] = 1  # what is new sees something
        mask[0, 0] = 0  # the check shall see that the file heeds it
        of_tokens[ATTENTION_MASK] = mask
    if "position_ids" in signature.parameters:
        of_tokens.setdefault("position_ids", torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1))
    settings = {key: value for key, value in given.items() if not isinstance(value, Tensor)} | {"use_cache": True}
    settings.pop("return_dict", None)
    try:
        with torch.no_grad():
            cache = getattr(model(**{key: value[:, :_CACHED] for key, value in of_tokens.items()}, **settings), CACHE, None)
    except Exception as refusal:  # the user's forward may raise anything
        raise ExportError(f"the {name} does not run on the first {_CACHED} tokens of example_inputs: {refusal}") from refusal
    if cache is None:
        raise ExportError(f"cache=True, but the {name} has no cache: use_cache=True makes it return no {CACHE!r}. Leave cache out.")
    rest = {key: value if key == ATTENTION_MASK else value[:, _CACHED:] for key, value in of_tokens.items()}
    return ExportExample((), {**rest, CACHE: _layers_of(cache, name), **settings}).on_its_own()


def _by_name(signature: inspect.Signature, example: ExportExample) -> dict[str, Any]:
    given = dict(signature.bind(*example.args, **example.kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return {name: value for name, value in given.items() if value is not None}


def _values_of_tokens(given: Mapping[str, Any]) -> dict[str, Tensor]:
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < _FEWEST_TOKENS:
        found = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ExportError(f"cache=True wants 'input_ids' of shape (batch, {_FEWEST_TOKENS} or more), got {found}.")
    if CACHE in given:
        raise ExportError(f"cache=True makes the cache of the first tokens of the example: leave {CACHE!r} out of example_inputs.")
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.shape[:2] != ids.shape:
            raise ExportError(
                f"cache=True wants a value for each token, but {name!r} has shape {list(value.shape)} for 'input_ids' of {list(ids.shape)}."
            )
    return {"input_ids": ids, **tensors}


def _layers_of(cache: Any, name: str) -> _Layers:
    """The keys and values of each layer.

    Raises:
        ExportError: a layer keeps something else, or not of every token.
    """
    layers = [{"key": getattr(layer, "keys", None), "value": getattr(layer, "values", None)} for layer in getattr(cache, "layers", [None])]
    for number, layer in enumerate(layers):
        if not all(isinstance(tensor, Tensor) and tensor.shape[2] == _CACHED for tensor in layer.values()):
            raise ExportError(
                f"layer {number} of the cache of the {name} does not hold keys and values of every token, which is what cache=True exports."
            )
    return cast(_Layers, layers)


def sizes_of_text(example: ExportExample) -> tuple[tuple[int, int], ...]:
    """(input, axis) of batch, new length and cached length, in an example of :func:`in_mid_text`."""
    return (0, 0), (0, 1), (len(example.tensors) - len(example.cached), 2)


def tensors_for_cache(model: nn.Module, example: ExportExample) -> AbstractContextManager[None]:
    """Within the block the model takes the tensors of a cache in its place, as the example has them, and returns them as "present"."""
    from transformers import DynamicCache

    forward = model.forward

    def with_tensors(**inputs: Any) -> dict[str, Any]:
        layers: _Layers = inputs.pop(CACHE)
        (batch, new), cached = inputs["input_ids"].shape, layers[0]["key"].shape[2]
        if ATTENTION_MASK in inputs:  # a model takes a longer one too, and would leave the length open
            _compat.check_shape(inputs[ATTENTION_MASK], {0: batch, 1: cached + new})
        for tensor in (tensor for layer in layers for tensor in layer.values()):
            _compat.check_shape(tensor, {2: cached})
        cache = DynamicCache([(layer["key"], layer["value"]) for layer in layers])  # layers of a window keep everything: the mask hides it
        returned = dict(forward(**inputs, **{CACHE: cache}))
        present = returned.pop(CACHE)
        return {**returned, "present": [{"key": layer.keys, "value": layer.values} for layer in present.layers]}

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in example.kwargs]
    return forward_as(model, with_tensors, parameters)
