"""What is otherwise about a model, and in torch, while torch.export and torch.onnx look at it."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from diffq_fx import _compat
from diffq_fx.errors import ExportError


@contextmanager
def forward_as(model: nn.Module, forward: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> Iterator[None]:
    """Let a model compute by another forward, whose signature has these parameters: by them torch.export names and sizes the inputs."""
    own = vars(model).get("forward")
    vars(forward)["__signature__"] = inspect.Signature(list(parameters))
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextmanager
def keywords_named(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let the signature of a forward with ``**kwargs``, as PEFT's models have, name them: only what is named can have dynamic sizes."""
    given, forward = inspect.signature(model.forward).parameters, model.forward
    fixed = [each for each in given.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names if name not in given]
    if not added or len(fixed) == len(given):
        yield
        return
    with forward_as(model, lambda *args, **kwargs: forward(*args, **kwargs), [*fixed, *added]):
        yield


@contextmanager
def experts_in_batches(model: nn.Module) -> Iterator[None]:
    """Let transformers' mixtures of experts compute by batched products: their grouped one computes the same, and has no form in ONNX."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    before = [(each, each._experts_implementation_internal) for each in configs if hasattr(each, "_experts_implementation_internal")]
    try:
        for config, _ in before:
            config._experts_implementation_internal = "batched_mm"
        yield
    finally:
        for config, name in before:
            config._experts_implementation_internal = name


def _output_shape(input: Tensor, hidden: Tensor, bidirectional: bool) -> Tensor:
    return input.new_empty(*input.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1))


def _lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # noqa: ANN001, ANN202
    return _output_shape(input, hx[0], bidirectional), torch.empty_like(hx[0]), torch.empty_like(hx[1])


def _gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # noqa: ANN001, ANN202
    return _output_shape(input, hx, bidirectional), torch.empty_like(hx)


def recurrent_layers_whole() -> AbstractContextManager[None]:
    """Let torch find out what LSTM and GRU return without running them; for tracing alone, since the values are not worked out.

    With a symbolic batch torch works them out cell by cell, several times over: a tenth of a second for each element of the sequence,
    minutes for a second of sound. The graph has them whole in any case; only their shapes are asked for. (Plain RNN has no translation
    to ONNX in torch and is cut up.)
    """
    return _compat.shapes_without_running({torch.ops.aten.lstm.input: _lstm, torch.ops.aten.gru.input: _gru})


def check_recurrent_layers(graph: fx.Graph) -> None:
    """Refuse what ONNX has no recurrent operator for.

    Raises:
        ExportError: an LSTM has projections, with its name and sizes.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten.lstm.input:
            hidden, cell = (state.meta["val"].shape[-1] for state in node.args[1])
            if hidden != cell:
                raise ExportError(
                    f"{node.name}: an LSTM with projections (proj_size={hidden}, hidden_size={cell}), and the LSTM of ONNX has none. "
                    "Use an LSTM without proj_size and a Linear layer behind it."
                )
