"""Brings a converted model to ONNX with one placeholder node for each weight, which the layout rules then replace."""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateHashedInitializersPass, InlinePass
from onnxscript.values import Op, Opset
from torch import nn

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.branches import SIZE_ADVICE, branches, input_values, stated_limits, turning_points
from diffq_fx.export.onnx.causes import tracing_cause, translation_cause
from diffq_fx.export.onnx.examples import ExportExample
from diffq_fx.export.onnx.layout.apply import PLACEHOLDER_DOMAIN
from diffq_fx.export.onnx.naming import name_outputs, name_sizes
from diffq_fx.export.onnx.recurrent import check_recurrent_layers, recurrent_layers_whole
from diffq_fx.parts import stored_weights
from diffq_fx.storage import StoredWeight

BASE_OPSET = 20
"""The opset that torch.onnx writes its operators in; higher ones are conversions from it. From 20 on Gelu is one operator."""

_FEW_VALUES = 2**18
_TIMES_AS_MANY = 16
"""A comparison at another size has inputs of so few values, or of so many times as the example's: no more time than that."""

_TRACING_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError)


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model in ONNX with placeholders."""

    model: ir.Model
    sizes: dict[str, int]
    """Symbolic size of an input -> what it is in the user's example."""
    other_sizes: dict[str, int]
    """The same with every size changed by one, within what the model allows."""
    turning_points: list[dict[str, int]]
    """Others at which the trace may have another branch than the model, if the model takes them."""
    remarks: tuple[str, ...]

    def shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The shape of each input at these sizes."""
        shapes = [value.shape or ir.Shape([]) for value in self.model.graph.inputs]
        return [tuple(size if isinstance(size, int) else 1 for size in shape.evaluate(sizes)) for shape in shapes]


def weights_by_initializer(converted: nn.Module) -> dict[str, StoredWeight]:
    """Name of the initializer that holds a weight's levels or codes -> the weight, for every name that the weight has."""
    named = {id(module): stored for module, stored in stored_weights(converted)}
    modules = converted.named_modules(remove_duplicate=False)
    return {f"{name}.{module.packed_buffer}".lstrip("."): named[id(module)] for name, module in modules if isinstance(module, StoredWeight)}


def trace(converted: nn.Module, example: ExportExample, dynamic_shapes: Any, static: str = "") -> TracedModel:
    """Trace a model with torch.export and translate it to ONNX.

    Where that fails it is tried without torch.onnx's optimizer, then with a static batch; a remark says so.

    Args:
        converted: in eval mode.
        example: the user's example.
        dynamic_shapes: as torch.export has them; None makes dim 0 of every tensor dynamic where the model allows it.
        static: why the batch is to be static, for the remark; empty if it need not be.

    Raises:
        ExportError: a size that ``dynamic_shapes`` makes dynamic decides a branch; torch.export or torch.onnx cannot follow the model.
    """
    with quiet(), recurrent_layers_whole(), torch.no_grad():  # with gradients on, attention is taken apart into other operators
        if dynamic_shapes is not None:
            program = _exported(converted, example, dynamic_shapes)
            if found := branches(converted, program, example, dynamic_shapes):
                raise ExportError(f"{found[0]}. {SIZE_ADVICE}")
            return _translated(converted, program, example, (), stated_limits(dynamic_shapes))
        if not static:
            try:
                program = _with_dynamic_batch(converted, example)
                found = branches(converted, program, example)
                if not found:
                    fixed = "" if _has_dynamic_batch(program) else "the model's own code fixes it, or it cannot repeat"
                    return _translated(converted, program, example, (_static_remark(example, fixed),) if fixed else ())
                static = found[0]
            except ExportError as error:
                try:
                    return trace(converted, example, None, static=f"with a dynamic one {error}")
                except ExportError:
                    raise error from error.__cause__
        return _translated(converted, _exported(converted, example, None), example, (_static_remark(example, static),))


def _with_dynamic_batch(converted: nn.Module, example: ExportExample) -> torch.export.ExportedProgram:
    repeated = _repeated(converted, example)
    program = _exported(converted, repeated, repeated.dynamic_batch())
    return program if repeated is example or _has_dynamic_batch(program) else _exported(converted, example, None)


def _static_remark(example: ExportExample, reason: str) -> str:
    sizes = ", ".join(str(tensor.shape[0]) for tensor in example.tensors if tensor.dim())
    return f"the batch, size 0 of the inputs, is static ({sizes}): {reason}. Give dynamic_shapes where the batch is another size"


def _repeated(converted: nn.Module, example: ExportExample) -> ExportExample:
    """The example with a batch of two instead of one, if the model can run on that."""
    repeated = example.repeated()
    if repeated is None:
        return example
    try:
        repeated.run(converted)
    except _TRACING_ERRORS:
        return example
    return repeated


def _exported(converted: nn.Module, example: ExportExample, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    try:
        program = torch.export.export(converted, example.args, example.kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except _TRACING_ERRORS as error:
        raise ExportError(
            f"torch.export cannot trace the {type(converted).__name__}: {tracing_cause(error)}\n"
            "  Check the example inputs, and dynamic_shapes if you gave them (their example sizes must be 2 or more); "
            "control flow that depends on values needs torch.cond."
        ) from error
    check_recurrent_layers(program.graph)
    _number_levels(program, converted)
    return program


def _number_levels(program: torch.export.ExportedProgram, converted: nn.Module) -> None:
    """Put a number in the place of each weight's levels: torch.onnx makes one initializer of equal ones, whatever their scales are."""
    tensors = {**program.state_dict, **program.constants}
    number_of: dict[int, int] = {}
    for name in weights_by_initializer(converted):
        holder = program.state_dict if name in program.state_dict else program.constants
        if name in tensors:
            number = number_of.setdefault(tensors[name].data_ptr(), len(number_of))
            holder[name] = torch.frombuffer(bytearray(b"levels" + number.to_bytes(8, "little")), dtype=torch.uint8)


def _translated(
    converted: nn.Module,
    program: torch.export.ExportedProgram,
    example: ExportExample,
    remarks: tuple[str, ...],
    stated: Set[int | None] = frozenset(),
) -> TracedModel:
    """Translate; without torch.onnx's optimizer where that is what fails."""
    try:
        return _traced(_to_onnx(program, optimize=True), program, example, remarks, stated)
    except (torch.onnx.errors.OnnxExporterError, *_TRACING_ERRORS) as error:
        try:
            model = _to_onnx(program, optimize=False)
        except (torch.onnx.errors.OnnxExporterError, *_TRACING_ERRORS):
            cause = translation_cause(error, program)
            raise ExportError(f"torch.onnx cannot translate the {type(converted).__name__}: {cause}") from error
        remark = f"the graph is not optimized by torch.onnx, which fails on it ({translation_cause(error, program)})"
        return _traced(model, program, example, (*remarks, remark), stated)


def _to_onnx(program: torch.export.ExportedProgram, *, optimize: bool) -> ir.Model:
    placeholder = _placeholder()
    table: dict[Any, Any] = {torch.ops.diffq_fx.dequantize.default: placeholder, torch.ops.diffq_fx.look_up.default: placeholder}
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


def _traced(
    model: ir.Model, program: torch.export.ExportedProgram, example: ExportExample, remarks: tuple[str, ...], stated: Set[int | None]
) -> TracedModel:
    inputs = model.graph.inputs
    names = name_sizes(model.graph)
    returned = program.call_spec.out_spec
    if returned is not None and returned.num_leaves == len(model.graph.outputs):
        name_outputs(model.graph, returned.unflatten(range(returned.num_leaves)))
    if len(inputs) != len(example.tensors):
        raise ExportError(
            f"the exported graph has {len(inputs)} inputs {[value.name for value in inputs]}, the example {len(example.tensors)} "
            "tensors; give every input as a tensor of its own."
        )
    pairs = zip(input_values(program), example.tensors, strict=True)
    by_symbol = {str(size): actual for value, tensor in pairs for size, actual in zip(value.shape, tensor.shape, strict=True)}
    by_symbol = {symbol: actual for symbol, actual in by_symbol.items() if symbol in names}
    sizes = {names[symbol]: actual for symbol, actual in by_symbol.items()}
    largest = {names.get(str(symbol)): bounds.upper for symbol, bounds in program.range_constraints.items()}
    points = [{names[symbol]: size for symbol, size in point.items()} for point in turning_points(program, by_symbol, stated)]
    for point in points:  # a second batch that the model keeps apart follows the first
        point.update({name: point["batch"] for name in sizes if name.endswith("_0") and sizes[name] == sizes.get("batch")})
    traced = TracedModel(model, sizes, _other_sizes(sizes, largest), [], remarks)
    most = max(_FEW_VALUES, _TIMES_AS_MANY * sum(tensor.numel() for tensor in example.tensors))
    points = [point for point in points if point != sizes and sum(map(math.prod, traced.shapes(point))) <= most]
    return replace(traced, turning_points=points)


def _other_sizes(sizes: dict[str, int], largest: dict[str | None, Any]) -> dict[str, int]:
    """Every size changed by one; one that is the sum of two others (a mask over what is cached and what is new) stays their sum."""
    others = {name: size + 1 if size + 1 <= largest.get(name, size + 1) else size - 1 for name, size in sizes.items()}
    lengths = [name for name in sizes if name != "batch" and not name.endswith("_0")]  # a second batch is no length
    for name in lengths:
        pairs = combinations([each for each in lengths if each != name], 2)
        total = next((others[one] + others[other] for one, other in pairs if sizes[one] + sizes[other] == sizes[name]), None)
        if total is not None and total <= largest.get(name, total):
            others[name] = total
    return others


def _has_dynamic_batch(program: torch.export.ExportedProgram) -> bool:
    """Whether any input has a symbolic first size, or there is no first size to make symbolic."""
    firsts = [value.shape[0] for value in input_values(program) if value.dim()]
    return not firsts or any(not str(size).isdigit() for size in firsts)  # a SymInt with a guard on its value prints as that value


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters and quantizers say about themselves: nothing of it is for the user of this library."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "onnxruntime.quantization")]
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
