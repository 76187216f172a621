"""Mixtures of experts of transformers, whose grouped product has no form in ONNX; their batched one computes the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def experts_in_batches(model: nn.Module) -> Iterator[None]:
    """Let the experts of a model compute by batched products, and as before afterwards."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    before = [(each, each._experts_implementation_internal) for each in configs if hasattr(each, "_experts_implementation_internal")]
    try:
        for config, _ in before:
            config._experts_implementation_internal = "batched_mm"
        yield
    finally:
        for config, name in before:
            config._experts_implementation_internal = name
