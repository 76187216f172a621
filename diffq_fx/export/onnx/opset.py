"""The smallest opset that holds what a graph has: its containers and its DequantizeLinear nodes."""

import onnx
import onnx_ir as ir
from onnxscript.version_converter import convert_version

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.request import BLOCKED_OPSET
from diffq_fx.export.onnx.translation import BASE_OPSET

MAX_OPSET = 25
"""The highest opset that onnxscript converts to; 2-bit types need it."""

_CONTAINER_OPSETS = {
    ir.DataType.INT4: 21,
    ir.DataType.UINT4: 21,
    ir.DataType.INT2: 25,
    ir.DataType.UINT2: 25,
}
_SIXTEEN_BIT_TYPES = (ir.DataType.INT16, ir.DataType.UINT16)


def set_opset(model: ir.Model, asked: int | None) -> None:
    """Convert a model in place to the smallest opset that holds it, or to the one that the user asked for.

    Raises:
        ExportError: The opset is too low for a container, or not one that models can be converted to.
    """
    needed, reason = _needed_opset(model)
    target = needed if asked is None else asked
    if not BASE_OPSET <= target <= MAX_OPSET:
        raise ExportError(f"opset {target} is outside of {BASE_OPSET} to {MAX_OPSET}, which the exporter can write.")
    if target < needed:
        raise ExportError(
            f"opset {target} is too low: {reason} needs {needed}. Leave opset out, give {needed} or more, or a larger min_container."
        )
    if target > BASE_OPSET:
        convert_version(model, target)
    if model.opset_imports[""] != target:
        raise ExportError(f"the model could not be converted to opset {target}; it is at {model.opset_imports['']}.")
    model.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", target]


def _needed_opset(model: ir.Model) -> tuple[int, str]:
    """The smallest opset that holds a model, and what asks for it."""
    asking = [(BASE_OPSET, "the model")]
    for name, value in model.graph.initializers.items():
        if value.dtype is not None and value.dtype in _CONTAINER_OPSETS:
            asking.append((_CONTAINER_OPSETS[value.dtype], f"{value.dtype.name} of {name!r}"))
    for node in model.graph.all_nodes():
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            if node.attributes.get_int("block_size", 0):
                asking.append((BLOCKED_OPSET, f"block_size of {node.name!r}"))
            if source is not None and source.dtype in _SIXTEEN_BIT_TYPES:
                asking.append((BLOCKED_OPSET, f"DequantizeLinear of 16 bits {node.name!r}"))
    return max(asking, key=lambda pair: pair[0])
