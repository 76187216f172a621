"""The gate: a prepared model computes what the original computes, and every weight reaches it through its quantizer alone.

One experiment shows both. Each quantizer hands out the true weight (noise off), and the weights themselves are replaced by NaN. If output,
arguments and buffers still equal the original's bit by bit, in train, eval and eval without grad, then nothing was changed and
nothing reads a weight past its quantizer. No hook is installed, since hooks switch fast paths off.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.capture.calls import MODES, ExampleCall, restored_state, strided_parts
from diffq_fx.errors import CaptureError
from diffq_fx.functional.precision import widened
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.passes._graph import attribute_of


@dataclass(frozen=True)
class Reference:
    """What the original model does with the example, and what it leaves behind."""

    outcomes: list[tuple[Any, Any]]
    """Output, and arguments after the call, one pair for each of ``MODES``."""
    buffers: dict[str, Tensor]

    @staticmethod
    def of(model: nn.Module, call: ExampleCall) -> "Reference":
        """Run the original; ``model`` is a copy that may be run."""
        outcomes = [_compat.map_tensors(Tensor.detach, call.outcome(model, mode)) for mode in MODES]  # no graph kept alive
        return Reference(outcomes, {name: buffer.detach().clone() for name, buffer in model.named_buffers()})


def _difference(found: Any, expected: Any, what: str, seen: dict[tuple[int, int], Any] | None = None) -> str:
    """What differs between two results; empty if they are the same bit by bit, in containers of the same types."""
    seen = {} if seen is None else seen
    if found is expected or isinstance(found, nn.Module) or (id(found), id(expected)) in seen:
        return ""
    seen[id(found), id(expected)] = (found, expected)  # objects may hold each other; kept alive, so that no id is used again
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return _tensor_difference(found, expected, what)
    if type(found) is not type(expected):
        return f"{what} is a {type(found).__name__}, the original's a {type(expected).__name__}"
    if isinstance(found, int | float | complex | str | bytes):
        return "" if found == expected or found != found else f"{what} is {found!r}, the original's {expected!r}"
    found_parts, expected_parts = _parts(found), _parts(expected)
    if found_parts.keys() != expected_parts.keys():
        return f"{what} holds {list(found_parts)}, the original's {list(expected_parts)}"
    differences = (_difference(part, expected_parts[key], f"{what}[{key!r}]", seen) for key, part in found_parts.items())
    return next(filter(None, differences), "")


@torch.no_grad()
def _tensor_difference(found: Tensor, expected: Tensor, what: str) -> str:
    if (found.shape, found.dtype, found.layout) != (expected.shape, expected.dtype, expected.layout):
        return f"{what} is {_kind(found)}, the original's {_kind(expected)}"
    for a, b in zip(strided_parts(found), strided_parts(expected), strict=True):
        if a.shape != b.shape:
            return f"{what} has {a.shape[-1]} entries, the original's {b.shape[-1]}"
        same = (a == b) | ((a != a) & (b != b))
        if not bool(same.all()):
            worst = (widened(a) - widened(b)).abs().nan_to_num(nan=float("inf")).max().item()
            return f"{int((~same).sum())} of {same.numel()} values of {what} differ, by up to {worst:.3g}"
    return ""


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f"{tensor.layout} "
    return f"{layout}{tensor.dtype} {tuple(tensor.shape)}"


def _parts(value: Any) -> dict[Any, Any]:
    """What an object of any type is made of, by key; empty for what cannot be looked into."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return {} if isinstance(value, type) or callable(value) else getattr(value, "__dict__", {})


@contextmanager
def _noise_off_and_weights_unreadable(model: nn.Module, quantizers: Sequence[WeightQuantizer]) -> Iterator[None]:
    """Quantizers hand out the true weights; the weights themselves are one NaN each, whoever holds them: no memory."""
    values: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for quantizer in quantizers:
            weight = model.get_parameter(quantizer.spec.name)
            values.append((weight, weight.data))
            readable = nn.Parameter(weight.data, weight.requires_grad)
            quantizer.pass_through(lambda readable=readable: readable)
            # Not another parameter in its place: a list or an attribute of the user's may hold this one.
            weight.data = torch.full((1,), float("nan"), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        yield
    finally:
        for weight, data in values:
            weight.data = data
        for quantizer in quantizers:
            quantizer.pass_through(None)


def check_faithful(prepared: nn.Module, quantizers: Sequence[WeightQuantizer], call: ExampleCall, reference: Reference) -> None:
    """Compare what a prepared model does with what the original did, noise off and weights unreadable.

    Raises:
        CaptureError: in which mode and by how much they differ, or what the prepared model raised.
    """
    with restored_state(prepared), _noise_off_and_weights_unreadable(prepared, quantizers):
        difference = _first_difference(prepared, call, reference)
        if difference:
            raise CaptureError(f"with noise off, {difference}")


def _first_difference(model: nn.Module, call: ExampleCall, reference: Reference) -> str:
    """Run a model as the original was run, and say what comes out different first."""
    for mode, (output, arguments) in zip(MODES, reference.outcomes, strict=True):
        try:
            found_output, found_arguments = call.outcome(model, mode)
        except Exception as err:  # the user's forward may raise anything  # noqa: BLE001
            return f"in {mode} the model fails: {type(err).__name__}: {err}"
        pairs = ((found_output, output, "the output"), (found_arguments, arguments, "the arguments after the call"))
        for difference in filter(None, (_difference(*pair) for pair in pairs)):
            return f"in {mode}: {difference}"
    buffers = {name: attribute_of(model, name) for name in reference.buffers}
    return _difference(buffers, reference.buffers, "the buffers after the call")


def unrepeatable(model: nn.Module, call: ExampleCall, reference: Reference) -> str:
    """What differs when the original model runs again from the same seed; empty if nothing does."""
    return _first_difference(model, call, reference)
