"""The gate: a prepared model computes what the original computes, and every weight reaches it through its quantizer alone.

One experiment shows both. Each quantizer hands out the true weight (noise off), and the weights themselves are replaced by NaN. If the
result still equals the original's bit by bit, in train, eval and eval without grad, then nothing was changed and
nothing reads a weight past its quantizer. No hook is installed, since hooks switch fast paths off.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from diffq_fx.capture.calls import MODES, ExampleCall, restored_state
from diffq_fx.capture.swapping import owner_of
from diffq_fx.errors import CaptureError
from diffq_fx.methods.base import WeightQuantizer


def reference_outputs(model: nn.Module, call: ExampleCall) -> list[Any]:
    """Outputs of the original model in every mode; ``model`` is a copy that may be run."""
    return [call.run(model, mode) for mode in MODES]


@torch.no_grad()
def _difference(found: Any, expected: Any) -> str:
    """What differs between two outputs; empty if they are the same bit by bit."""
    (found_leaves, found_tree), (expected_leaves, expected_tree) = tree_flatten(found), tree_flatten(expected)
    if found_tree != expected_tree:
        return f"the output is a {_name(found)}, the original's a {_name(expected)}"
    for a, b in zip(found_leaves, expected_leaves, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"the output is {a.dtype} {tuple(a.shape)}, the original's {b.dtype} {tuple(b.shape)}"
            same = (a == b) | ((a != a) & (b != b))
            if not bool(same.all()):
                worst = (a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max().item()
                return f"{int((~same).sum())} of {same.numel()} outputs differ, by up to {worst:.3g}"
        elif isinstance(a, Tensor) != isinstance(b, Tensor):
            return f"the output holds a {_name(a)} where the original has a {_name(b)}"
    return ""


def _name(value: Any) -> str:
    return type(value).__name__


@contextmanager
def _noise_off_and_weights_unreadable(model: nn.Module, quantizers: Sequence[WeightQuantizer]) -> Iterator[None]:
    """Quantizers hand out the true weights; the weights themselves are NaN. Takes no memory: one NaN stands for a whole weight."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for quantizer in quantizers:
            for name in quantizer.spec.names:
                owner, attribute = owner_of(model, name)
                weight = owner._parameters[attribute]  # noqa: SLF001
                replaced.append((owner, attribute, weight))
                quantizer.pass_through(lambda weight=weight: weight)
                nan = torch.full((1,), float("nan"), dtype=weight.dtype, device=weight.device)
                setattr(owner, attribute, nn.Parameter(nan.expand(weight.shape), weight.requires_grad))
        yield
    finally:
        for owner, attribute, weight in reversed(replaced):
            setattr(owner, attribute, weight)
        for quantizer in quantizers:
            quantizer.pass_through(None)


def check_faithful(
    prepared: nn.Module, quantizers: Sequence[WeightQuantizer], call: ExampleCall, expected: Sequence[Any]
) -> None:
    """Compare a prepared model with the original's outputs, noise off and weights unreadable.

    Raises:
        CaptureError: in which mode and by how much they differ, or what the prepared model raised.
    """
    with restored_state(prepared), _noise_off_and_weights_unreadable(prepared, quantizers):
        for mode, reference in zip(MODES, expected, strict=True):
            try:
                found = call.run(prepared, mode)
            except Exception as err:  # the user's forward may raise anything  # noqa: BLE001
                raise CaptureError(f"in {mode} the prepared model fails: {type(err).__name__}: {err}") from err
            difference = _difference(found, reference)
            if difference:
                raise CaptureError(f"in {mode} with noise off: {difference}")


def is_repeatable(model: nn.Module, call: ExampleCall, expected: Sequence[Any]) -> str:
    """What differs when the original model runs again from the same seed; empty if nothing does."""
    for mode, reference in zip(MODES, expected, strict=True):
        difference = _difference(call.run(model, mode), reference)
        if difference:
            return f"in {mode}: {difference}"
    return ""
