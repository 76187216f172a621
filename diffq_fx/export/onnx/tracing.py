"""Traces a converted model with as many dynamic sizes as it allows, and says of the others why they are fixed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.branches import SIZE_ADVICE, branches, input_values, stated_limits, turning_points
from diffq_fx.export.onnx.causes import left_out, tracing_cause
from diffq_fx.export.onnx.examples import FORWARD_ERRORS, ExportExample
from diffq_fx.export.onnx.naming import PAST, InterfaceNames, name_sizes
from diffq_fx.export.onnx.translation import quiet, translate
from diffq_fx.export.onnx.while_traced import check_recurrent_layers, experts_in_batches, keywords_named, recurrent_layers_whole

_FEW_VALUES = 2**18
_TIMES_AS_MANY = 16
"""A comparison at another size has inputs of so few values, or of so many times as the example's: no more time than that."""

Dynamic = Literal["lengths", "batch", "nothing"]
_LEVELS: tuple[Dynamic, ...] = ("lengths", "batch", "nothing")
"""What a trace leaves dynamic (lengths: and the batch), in the order in which it is tried."""


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model in ONNX with placeholders."""

    model: ir.Model
    dynamic: Dynamic
    """What was asked for."""
    sizes: dict[str, int]
    """Symbolic size of an input -> what it is in the user's example."""
    fixed: dict[str, str]
    """``"input.axis"`` of each other size -> why it is fixed."""
    other_sizes: dict[str, int]
    """The same with every size changed by one, within what the model allows."""
    turning_points: list[dict[str, int]]
    """Others at which the trace may have another branch than the model, if the model takes them."""
    remarks: tuple[str, ...]

    @property
    def fewer(self) -> Dynamic:
        """What to leave dynamic if that was too much."""
        return _LEVELS[_LEVELS.index(self.dynamic) + 1]

    def shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """The shape of each input at these sizes."""
        shapes = [value.shape or ir.Shape([]) for value in self.model.graph.inputs]
        return [tuple(size if isinstance(size, int) else 1 for size in shape.evaluate(sizes)) for shape in shapes]


@dataclass(frozen=True, eq=False)
class Tracer:
    """One model and what its graph shall be like."""

    converted: nn.Module
    """In eval mode."""
    example: ExportExample
    dynamic_shapes: Any = None
    """As torch.export has them; None for the sizes of :meth:`ExportExample.dynamic_axes` that the model allows."""
    names: InterfaceNames = field(default_factory=InterfaceNames)
    needed: tuple[tuple[int, int], ...] = ()
    """(input, axis) of each size that must be dynamic."""
    refusals: list[ExportError] = field(default_factory=list)
    """Why the bytecode was traced, which says more than what becomes of it."""

    def trace(self, dynamic: Dynamic = "lengths", reason: str = "") -> TracedModel:
        """Trace with torch.export and translate to ONNX; where that fails, with fewer dynamic sizes.

        Args:
            dynamic: what to begin with.
            reason: why not with more.

        Raises:
            ExportError: a size that ``dynamic_shapes`` makes dynamic decides a branch, or one that must be is not; torch.export or
                torch.onnx cannot follow the model.
        """
        # with gradients on, attention is taken apart into other operators
        with quiet(), recurrent_layers_whole(), experts_in_batches(self.converted), torch.no_grad():
            if self.dynamic_shapes is not None:
                program = self._exported(self.example, self.dynamic_shapes)
                if found := branches(self.converted, program, self.example, self.dynamic_shapes):
                    raise ExportError(f"{found[0]}. {SIZE_ADVICE}")
                return self._translated(program, dynamic, reason)
            failure: ExportError | None = None
            for level in _LEVELS[_LEVELS.index(dynamic) : 1 if self.needed else None]:
                if level == "lengths" and not self.example.has_lengths:
                    continue
                try:
                    program = self._program(level)
                    found = [] if level == "nothing" else branches(self.converted, program, self.example)
                    if not found:
                        return self._translated(program, level, reason)
                    reason = found[0]
                except ExportError as error:
                    failure = failure or (self.refusals or [error])[0]
                    reason = f"with a dynamic one {error}"
            raise failure or ExportError(reason)

    def _program(self, level: Dynamic) -> torch.export.ExportedProgram:
        if level == "nothing":
            return self._exported(self.example, None)
        repeated, lengths = self._repeated(), level == "lengths"
        program = self._exported(repeated, repeated.dynamic_sizes(lengths=lengths))
        if repeated is self.example or _has_dynamic_batch(program):
            return program
        return self._exported(self.example, self.example.dynamic_sizes(lengths=lengths))

    def _repeated(self) -> ExportExample:
        """The example with a batch of two instead of one, if the model can run on that."""
        repeated = self.example.repeated()
        if repeated is None:
            return self.example
        try:
            repeated.run(self.converted)
        except FORWARD_ERRORS:
            return self.example
        return repeated

    def _exported(self, example: ExportExample, dynamic_shapes: Any) -> torch.export.ExportedProgram:
        """Trace what runs; of a model that makes a number of a tensor (``int(lengths.max())``) the bytecode, where that is a symbol."""
        try:
            with keywords_named(self.converted, example.kwargs):
                export = partial(torch.export.export, self.converted, example.args, example.kwargs, dynamic_shapes=dynamic_shapes)
                try:
                    program = export(strict=False)
                except GuardOnDataDependentSymNode as error:
                    self.refusals.append(self._refusal(error, example))
                    program = export(strict=True)
        except FORWARD_ERRORS as error:
            raise (self.refusals or [self._refusal(error, example)])[0] from error
        check_recurrent_layers(program.graph)
        return program

    def _refusal(self, error: Exception, example: ExportExample) -> ExportError:
        return ExportError(
            f"torch.export cannot trace the {type(self.converted).__name__}: {tracing_cause(error)}\n"
            "  Check the example inputs, and dynamic_shapes if you gave them (their example sizes must be 2 or more); "
            f"control flow that depends on values needs torch.cond.{left_out(self.converted, example) * ('NoneType' in str(error))}"
        )

    def _translated(self, program: torch.export.ExportedProgram, dynamic: Dynamic, reason: str) -> TracedModel:
        model, remarks = translate(program, self.converted)
        inputs, tensors = model.graph.inputs, self.example.tensors
        if len(inputs) != len(tensors):
            raise ExportError(
                f"the exported graph has {len(inputs)} inputs {[value.name for value in inputs]}, the example {len(tensors)} "
                "tensors; give every input as a tensor of its own."
            )
        returned = program.call_spec.out_spec
        given = input_values(program)
        self.names.apply(model.graph, list(given), returned and returned.unflatten(range(returned.num_leaves)))
        names = name_sizes(model.graph)
        pairs = zip(given.values(), tensors, strict=True)
        by_symbol = {str(size): actual for value, tensor in pairs for size, actual in zip(value.shape, tensor.shape, strict=True)}
        by_symbol = {symbol: actual for symbol, actual in by_symbol.items() if symbol in names}
        sizes = {names[symbol]: actual for symbol, actual in by_symbol.items()}
        largest = {names.get(str(symbol)): bounds.upper for symbol, bounds in program.range_constraints.items()}
        fixed = self._fixed(model.graph, dynamic, reason)
        for place in (f"{inputs[number].name}.{axis}" for number, axis in self.needed):
            if place in fixed:
                raise ExportError(f"the size {place} must be dynamic: {fixed[place]}")
        if self.dynamic_shapes is None and not _has_dynamic_batch(program):
            batches = ", ".join(str(tensor.shape[0]) for tensor in tensors if tensor.dim())
            why = reason if dynamic == "nothing" else "the model's own code fixes it, or it cannot repeat"
            advice = "Give dynamic_shapes where the batch is another size"
            remarks = (f"the batch, size 0 of the inputs, is static ({batches}): {why}. {advice}", *remarks)
        traced = TracedModel(model, dynamic, sizes, fixed, _other_sizes(sizes, largest), [], remarks)
        stated = stated_limits(self.dynamic_shapes)
        may_be_nothing = {symbol for symbol, name in names.items() if name == PAST}
        found = turning_points(program, by_symbol, stated, may_be_nothing & by_symbol.keys())
        points = [{names[symbol]: size for symbol, size in point.items()} for point in found]
        for point in points:  # a second batch that the model keeps apart follows the first
            point.update({name: point["batch"] for name in sizes if name.endswith("_0") and sizes[name] == sizes.get("batch")})
        most = max(_FEW_VALUES, _TIMES_AS_MANY * sum(tensor.numel() for tensor in tensors))
        points = [point for point in points if point != sizes and sum(map(math.prod, traced.shapes(point))) <= most]
        return replace(traced, turning_points=points)

    def _fixed(self, graph: ir.Graph, dynamic: Dynamic, reason: str) -> dict[str, str]:
        """``"input.axis"`` of each size that is fixed -> why."""
        fixed = {}
        for value, tensor in zip(graph.inputs, self.example.tensors, strict=True):
            tried = self.example.dynamic_axes(tensor, lengths=True)
            for axis in (axis for axis, size in enumerate(value.shape or ()) if isinstance(size, int)):
                if self.dynamic_shapes is not None:
                    why = "dynamic_shapes leaves it"
                elif axis not in tried:
                    why = "an image keeps the sizes of the example; dynamic_shapes frees them"
                elif axis and tensor.shape[axis] == 1:
                    why = "it is 1 in the example"
                else:
                    gave_up = dynamic == "nothing" or (dynamic == "batch" and axis and reason)
                    why = reason.splitlines()[0] if gave_up else "the model fixes it"
                fixed[f"{value.name}.{axis}"] = why
        return fixed


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
    firsts = [value.shape[0] for value in input_values(program).values() if value.dim()]
    return not firsts or any(not str(size).isdigit() for size in firsts)  # a SymInt with a guard on its value prints as that value
