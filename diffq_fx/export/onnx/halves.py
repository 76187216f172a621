"""Parameters that are not quantized, stored as float16: half the bytes, cast back to float32 when the file is loaded."""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from diffq_fx.convert import CompressionRecord
from diffq_fx.export.onnx.layout.emitter import Emitter

_MIN_VALUES = 64
"""A tensor with fewer values would grow by its Cast node."""


def wants_halves(converted: nn.Module) -> bool:
    """Whether what is not quantized shall be stored as float16."""
    record = getattr(converted, "compression", None)
    if isinstance(record, CompressionRecord):
        return record.method.rest_dtype == "float16"
    return getattr(converted, "rest_dtype", None) is torch.float16


def halved_names(converted: nn.Module) -> set[str]:
    """Names of the float32 parameters that float16 can hold; buffers (running variances) need the range of float32."""
    return {
        name
        for name, parameter in converted.named_parameters(remove_duplicate=False)
        if parameter.dtype == torch.float32 and parameter.numel() >= _MIN_VALUES and bool(parameter.half().isfinite().all())
    }


def store_halves(model: ir.Model, names: set[str]) -> None:
    """Replace float32 initializers by float16 ones and a Cast.

    Args:
        model: changed in place.
        names: the initializers to replace; names that the graph does not have are ignored.
    """
    emitter = Emitter(model.graph)
    for name in sorted(names & set(model.graph.initializers)):
        value = model.graph.initializers[name]
        if value.dtype != ir.DataType.FLOAT or value.const_value is None:
            continue
        half = emitter.initializer(f"{name}.float16", value.const_value.numpy().astype(np.float16))
        value.replace_all_uses_with(emitter.op("Cast", [half], f"{name}.float32", dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT)))
        del model.graph.initializers[name]
    emitter.flush()


class HalvedModel(nn.Module):
    """A model that computes with some parameters rounded to float16, as its file will; the model itself is not touched."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the model with the rounded parameters."""
        rounded: dict[str, Tensor] = {name: p.half().float() for name, p in self.model.named_parameters() if name in self.names}
        return torch.func.functional_call(self.model, rounded, args, kwargs)
