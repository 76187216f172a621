"""Brings a converted model to ONNX with one placeholder node for each weight, which the layout rules then replace."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.values import Op, Opset
from torch import nn

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.examples import Example
from diffq_fx.export.onnx.layout.apply import PLACEHOLDER_DOMAIN
from diffq_fx.export.onnx.recurrent import check_recurrent_layers, recurrent_layers_whole
from diffq_fx.export.onnx.sizes import name_sizes
from diffq_fx.storage import StoredWeight

BASE_OPSET = 20
"""The opset that torch.onnx writes its operators in; higher ones are conversions from it. From 20 on Gelu is one operator."""

_TRACING_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError)


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model in ONNX with placeholders."""

    model: ir.Model
    sizes: dict[str, int]
    """Symbolic size of an input -> what it is in the user's example."""
    other_sizes: dict[str, int]
    """The same with every size changed by one, within what the model allows."""
    remarks: tuple[str, ...]

    @property
    def input_shapes(self) -> list[ir.Shape]:
        """The shape of each input of the graph."""
        return [value.shape if value.shape is not None else ir.Shape([]) for value in self.model.graph.inputs]


def weights_by_initializer(converted: nn.Module) -> dict[str, StoredWeight]:
    """Name of the initializer that holds a weight's levels or codes -> the weight, for every name that the weight has."""
    modules = converted.named_modules(remove_duplicate=False)
    return {f"{name}.{module.packed_buffer}".lstrip("."): module for name, module in modules if isinstance(module, StoredWeight)}


def trace(converted: nn.Module, example: Example, dynamic_shapes: Any) -> TracedModel:
    """Trace a model with torch.export and translate it to ONNX.

    Args:
        converted: in eval mode.
        example: the user's example.
        dynamic_shapes: as torch.export has them; None makes dim 0 of every tensor dynamic where the model allows it.

    Raises:
        ExportError: torch.export or torch.onnx cannot follow the model.
    """
    with quiet(), recurrent_layers_whole():
        if dynamic_shapes is not None:
            return _traced(converted, _exported(converted, example, dynamic_shapes), example, ())
        repeated = _repeated(converted, example)
        program = _exported(converted, repeated, repeated.dynamic_batch())
        if repeated is not example and not _has_dynamic_batch(program):
            program = _exported(converted, example, None)
        remarks = () if _has_dynamic_batch(program) else (_static_remark(example),)
        return _traced(converted, program, example, remarks)


def _static_remark(example: Example) -> str:
    sizes = ", ".join(str(tensor.shape[0]) for tensor in example.tensors if tensor.dim())
    return (
        f"the batch, size 0 of the inputs, is static ({sizes}): the model's own code fixes it, or cannot run on the example repeated "
        "along it. Give dynamic_shapes where the batch is another size"
    )


def _repeated(converted: nn.Module, example: Example) -> Example:
    """The example with a batch of two instead of one, if the model can run on that."""
    repeated = example.repeated()
    if repeated is None:
        return example
    try:
        repeated.run(converted)
    except _TRACING_ERRORS:
        return example
    return repeated


def _exported(converted: nn.Module, example: Example, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(converted, example.args, example.kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except _TRACING_ERRORS as error:
        raise ExportError(
            f"torch.export cannot trace the {type(converted).__name__}: {_first_lines(error)}\n"
            "  Check the example inputs, and dynamic_shapes if you gave them (their example sizes must be 2 or more); "
            "control flow that depends on values needs torch.cond."
        ) from error


def _number_levels(program: torch.export.ExportedProgram, converted: nn.Module) -> None:
    """Put a number in the place of each weight's levels: torch.onnx makes one initializer of equal ones, whatever their scales are."""
    tensors = {**program.state_dict, **program.constants}
    number_of: dict[int, int] = {}
    for name in weights_by_initializer(converted):
        holder = program.state_dict if name in program.state_dict else program.constants
        if name in tensors:
            number = number_of.setdefault(tensors[name].data_ptr(), len(number_of))
            holder[name] = torch.frombuffer(bytearray(b"levels" + number.to_bytes(8, "little")), dtype=torch.uint8)


def _translate(program: torch.export.ExportedProgram, converted: nn.Module) -> ir.Model:
    check_recurrent_layers(program.graph)
    _number_levels(program, converted)
    placeholder = _placeholder()
    table: dict[Any, Any] = {torch.ops.diffq_fx.dequantize.default: placeholder, torch.ops.diffq_fx.look_up.default: placeholder}
    try:
        translated = torch.onnx.export(program, (), dynamo=True, custom_translation_table=table, opset_version=BASE_OPSET, verbose=False)
    except (torch.onnx.errors.OnnxExporterError, *_TRACING_ERRORS) as error:
        raise ExportError(f"torch.onnx cannot translate the model: {_first_lines(error)}") from error
    if translated is None:
        raise ExportError("torch.onnx returned no model.")
    ClearMetadataAndDocStringPass()(translated.model)  # stack traces with the paths of this machine
    graph = translated.model.graph
    for described in (translated.model, graph, *graph.initializers.values(), *graph.inputs, *graph.outputs):
        described.metadata_props.clear()
    return translated.model


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


def _traced(converted: nn.Module, program: torch.export.ExportedProgram, example: Example, remarks: tuple[str, ...]) -> TracedModel:
    model = _translate(program, converted)
    sizes: dict[str, int] = {}
    inputs = model.graph.inputs
    names = name_sizes(model.graph)
    if len(inputs) != len(example.tensors):
        raise ExportError(
            f"the exported graph has {len(inputs)} inputs {[value.name for value in inputs]}, the example {len(example.tensors)} "
            "tensors; give every input as a tensor of its own."
        )
    for value, tensor in zip(inputs, example.tensors, strict=True):
        for size, actual in zip(value.shape or (), tensor.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and size.value.isidentifier():
                sizes[size.value] = actual
    largest = {names.get(str(symbol)): bounds.upper for symbol, bounds in program.range_constraints.items()}
    others = {name: size + 1 if size + 1 <= largest.get(name, size + 1) else size - 1 for name, size in sizes.items()}
    return TracedModel(model, sizes, others, remarks)


def _has_dynamic_batch(program: torch.export.ExportedProgram) -> bool:
    """Whether any input has a symbolic first size, or there is no first size to make symbolic."""
    users = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    firsts = [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.dim()]
    return not firsts or any(not str(size).isdigit() for size in firsts)  # a SymInt with a guard on its value prints as that value


def _first_lines(error: Exception, count: int = 3) -> str:
    return "\n  ".join(line for line in str(error).splitlines()[:count] if line.strip()) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch.export and torch.onnx say about themselves: nothing of it is for the user of this library."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
