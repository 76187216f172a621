"""Translates a traced model to ONNX with one placeholder node for each weight, which the layout rules then replace."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateHashedInitializersPass, InlinePass
from onnxscript import opset20
from onnxscript.values import Op, Opset
from torch import nn

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.causes import line_of, translation_cause
from diffq_fx.export.onnx.examples import FORWARD_ERRORS
from diffq_fx.export.onnx.layout.apply import PLACEHOLDER_DOMAIN
from diffq_fx.parts import stored_weights
from diffq_fx.storage import StoredWeight
from diffq_fx.threads import silent_stderr

BASE_OPSET = 20
"""The opset that torch.onnx writes its operators in; higher ones are conversions from it. From 20 on Gelu is one operator."""

_ASSERTIONS = ("aten._assert_", "aten.sym_constrain_range")


def weights_by_initializer(converted: nn.Module) -> dict[str, StoredWeight]:
    """Name of the initializer that holds a weight's levels or codes -> the weight, for every name that the weight has."""
    named = {id(module): stored for module, stored in stored_weights(converted)}
    modules = converted.named_modules(remove_duplicate=False)
    return {f"{name}.{module.packed_buffer}".lstrip("."): named[id(module)] for name, module in modules if isinstance(module, StoredWeight)}


def translate(program: torch.export.ExportedProgram, converted: nn.Module) -> tuple[ir.Model, tuple[str, ...]]:
    """Translate; without torch.onnx's optimizer where that is what fails, which a remark says.

    Raises:
        ExportError: torch.onnx cannot follow the model.
    """
    _number_levels(program, converted)
    remarks = _leave_assertions_out(program)
    try:
        return _to_onnx(program, optimize=True), remarks
    except (torch.onnx.errors.OnnxExporterError, *FORWARD_ERRORS) as error:
        cause = translation_cause(error, program)
        try:
            model = _to_onnx(program, optimize=False)
        except (torch.onnx.errors.OnnxExporterError, *FORWARD_ERRORS):
            raise ExportError(f"torch.onnx cannot translate the {type(converted).__name__}: {cause}") from error
        return model, (*remarks, f"the graph is not optimized by torch.onnx, which fails on it ({cause})")


def _number_levels(program: torch.export.ExportedProgram, converted: nn.Module) -> None:
    """Put a number in the place of each weight's levels: torch.onnx makes one initializer of equal ones, whatever their scales are."""
    tensors = {**program.state_dict, **program.constants}
    number_of: dict[int, int] = {}
    for name in weights_by_initializer(converted):
        holder = program.state_dict if name in program.state_dict else program.constants
        if name in tensors:
            number = number_of.setdefault(tensors[name].data_ptr(), len(number_of))
            mark = torch.frombuffer(bytearray(b"levels" + number.to_bytes(8, "little")), dtype=torch.uint8)
            holder[name] = mark.to(tensors[name].device)  # torch.onnx runs the graph once more, without values


def _leave_assertions_out(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Take assertions out of the graph, and what computes their conditions alone: torch.onnx would translate it.

    Returns:
        A remark that names those of the model; torch adds others.
    """
    lines: dict[str, None] = {}
    for node in [node for node in program.graph.nodes if str(node.target).startswith(_ASSERTIONS)]:
        line = line_of(node)
        if "_assert_async" in str(node.target) or "assert" in line or "torch._check" in line:
            lines[line or str(node.args[0])] = None
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    return (f"the file does not check what the forward asserts: {'; '.join(lines)}",) if lines else ()


def _to_onnx(program: torch.export.ExportedProgram, *, optimize: bool) -> ir.Model:
    placeholder = _placeholder()
    table: dict[Any, Any] = {torch.ops.diffq_fx.dequantize.default: placeholder, torch.ops.diffq_fx.look_up.default: placeholder}
    table[torch.ops.aten.squeeze.dim] = _squeeze
    options: dict[str, Any] = {"custom_translation_table": table, "opset_version": BASE_OPSET, "optimize": optimize}
    translated = torch.onnx.export(program, (), dynamo=True, verbose=False, **options)
    if translated is None:
        raise ValueError("torch.onnx returned no model")
    InlinePass()(translated.model)
    for value in translated.model.graph.initializers.values():  # the next pass cannot read expanded tensors
        if value.const_value is not None and not (array := value.const_value.numpy()).flags.c_contiguous:
            value.const_value = ir.Tensor(np.ascontiguousarray(array), dtype=value.const_value.dtype, name=value.name)
    DeduplicateHashedInitializersPass()(translated.model)  # one table of relative positions, not one for each layer
    ClearMetadataAndDocStringPass()(translated.model)  # stack traces with the paths of this machine
    graph = translated.model.graph
    for described in (translated.model, graph, *graph.initializers.values(), *graph.inputs, *graph.outputs):
        described.metadata_props.clear()
    return translated.model


def _squeeze(tensor: Any, dim: int) -> Any:
    """As PyTorch has it, which leaves a size that is not one; onnxscript's translation squeezes any, and the file does not load."""
    axes: Any = [dim]
    return opset20.Squeeze(tensor, axes) if len(tensor.shape) and tensor.shape[dim] == 1 else opset20.Identity(tensor)


def _placeholder() -> Any:
    """Translate the operator of a stored weight to a node that keeps nothing but the name of its levels or codes."""
    schema_type = onnx.defs.OpSchema
    schema = schema_type(
        "Dequantize",
        PLACEHOLDER_DOMAIN,
        1,
        inputs=[schema_type.FormalParameter("levels", "tensor(uint8)")],
        outputs=[schema_type.FormalParameter("weight", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "")],
    )
    operator = Op(Opset(PLACEHOLDER_DOMAIN, 1), "Dequantize", schema)

    def dequantize(levels: Any, *_: Any) -> Any:
        return operator(levels)

    return dequantize


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters and quantizers say about themselves: nothing of it is for the user of this library."""
    names = "torch.onnx torch.export torch._subclasses.fake_tensor torch.fx.experimental.symbolic_shapes onnxscript onnx_ir"
    loggers = [logging.getLogger(name) for name in (*names.split(), "onnxruntime.quantization")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what fails is raised as well
    try:
        with warnings.catch_warnings(), silent_stderr():  # a trace that fails prints its graph
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
