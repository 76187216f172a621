"""What is not quantized in a smaller type, cast back when a file is loaded: parameters as float16, tables of integers as they need."""

from collections.abc import Set

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from diffq_fx.convert import CompressionRecord
from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.parts import CHILD, parts_of
from diffq_fx.storage.packing import narrowed

_MIN_VALUES = 64
"""A tensor with fewer values would grow by its Cast node."""


def halved_names(converted: nn.Module) -> set[str]:
    """Names of the float32 parameters to be stored as float16, where that holds them; buffers need the range of float32."""
    parts = {path: vars(part)[CHILD].method.rest_dtype == "float16" for path, part in parts_of(converted, CompressionRecord).items()}
    if getattr(converted, "rest_dtype", None) is torch.float16:
        parts[""] = True
    prefixes = tuple(f"{path}." if path else "" for path, halves in parts.items() if halves)
    return {
        name
        for name, parameter in converted.named_parameters(remove_duplicate=False)
        if name.startswith(prefixes)
        and parameter.dtype == torch.float32
        and parameter.numel() >= _MIN_VALUES
        and bool(parameter.half().isfinite().all())
    }


def store_halves(model: ir.Model, names: Set[str]) -> None:
    """Replace float32 initializers by float16 ones and a Cast, in place; names that the graph does not have are ignored."""
    emitter = Emitter(model.graph)
    for name in sorted(names & model.graph.initializers.keys()):
        value = model.graph.initializers[name]
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            _store_as(emitter, value, value.const_value.numpy().astype(np.float16))
    emitter.flush()


def store_narrow_tables(model: ir.Model) -> None:
    """Replace large int64 initializers (indices of relative positions) by ones of a smaller type and a Cast, in place."""
    emitter = Emitter(model.graph)
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.INT64 and value.const_value is not None:
            table = torch.from_numpy(np.array(value.const_value.numpy()))
            small = narrowed(table)
            if small.dtype != table.dtype:
                _store_as(emitter, value, small.numpy())
    emitter.flush()


def _store_as(emitter: Emitter, value: ir.Value, stored: np.ndarray) -> None:
    name, dtype = str(value.name), value.dtype
    if dtype is None:
        return
    small = emitter.initializer(f"{name}.{stored.dtype}", stored)
    cast = emitter.cast(small, dtype)
    cast.shape = value.shape
    is_output = value.is_graph_output()
    value.replace_all_uses_with(cast, replace_graph_outputs=True)
    del emitter.graph.initializers[name]
    if is_output:
        cast.name = name


class HalvedModel(nn.Module):
    """A model that computes with some parameters rounded to float16, as its file will; the model itself is not touched."""

    def __init__(self, model: nn.Module, names: Set[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the model with the rounded parameters."""
        rounded: dict[str, Tensor] = {name: p.half().float() for name, p in self.model.named_parameters() if name in self.names}
        return torch.func.functional_call(self.model, rounded, args, kwargs)
