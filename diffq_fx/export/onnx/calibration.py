"""The ranges of activations: a file is run on the user's inputs, and each value gives out its least and largest number."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.examples import ExportExample
from diffq_fx.export.onnx.layout.request import Range
from diffq_fx.export.onnx.sessions import FREED, open_session, run_session, to_numpy


def calibrate(
    path: Path, watched: Mapping[str, tuple[str, str]], calibration: Iterable[Any], example: ExportExample, graph: ir.Graph
) -> tuple[dict[str, Range], ExportExample]:
    """Run a file on every item.

    Args:
        path: the file, with the outputs that ``watched`` names.
        watched: name of a value -> names of the outputs with its least and its largest number.
        calibration: inputs, each in a form that ``example_inputs`` may have.
        example: the user's example.
        graph: tells which sizes an input may have.

    Returns:
        Name of each value -> its range over all items, and the first item.

    Raises:
        ExportError: There is no item, or one does not fit, is not finite, or makes a value that is not finite.
    """
    session = open_session(path, 0, {}, **FREED)
    names = [entry.name for entry in session.get_inputs()]
    shapes = {str(value.name): value.shape for value in graph.inputs}
    ranges = dict.fromkeys(watched, (math.inf, -math.inf))
    first = None
    for count, item in enumerate(calibration, 1):
        tensors = _tensors(item, count, example)
        for name, tensor, wanted in zip(names, tensors, example.tensors, strict=True):
            _check(tensor, wanted, shapes[name], f"calibration item {count}, input {name!r}")
        first = first or example.replace(tensors)
        outputs = run_session(session, {name: to_numpy(tensor) for name, tensor in zip(names, tensors, strict=True)}, path)
        for value, (low_name, high_name) in watched.items():
            low, high = float(outputs[low_name]), float(outputs[high_name])
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ExportError(f"calibration item {count} makes {value!r} range from {low} to {high}: the model overflows on it.")
            ranges[value] = (min(ranges[value][0], low), max(ranges[value][1], high))
    if first is None:
        raise ExportError("the calibration is empty: give some typical inputs, each in the form of example_inputs.")
    return ranges, first


def _tensors(item: Any, number: int, example: ExportExample) -> list[torch.Tensor]:
    try:
        given = ExportExample.of(item)
    except TypeError as error:
        raise ExportError(f"calibration item {number} is a {type(item).__name__}, not inputs in the form of example_inputs.") from error
    if set(given.kwargs) == set(example.kwargs):
        given = ExportExample(given.args, {name: given.kwargs[name] for name in example.kwargs})
    if len(given.tensors) != len(example.tensors) or set(given.kwargs) != set(example.kwargs):
        raise ExportError(
            f"calibration item {number} has {len(given.tensors)} tensors, example_inputs {len(example.tensors)}: "
            "leave labels out, and give every input in the form of example_inputs."
        )
    return given.tensors


def _check(tensor: torch.Tensor, wanted: torch.Tensor, shape: ir.Shape | None, where: str) -> None:
    if tensor.dtype != wanted.dtype:
        raise ExportError(f"{where} is {tensor.dtype}, the example {wanted.dtype}.")
    sizes = list(shape or ())
    if len(sizes) != tensor.dim() or any(isinstance(n, int) and n != found for n, found in zip(sizes, tensor.shape, strict=True)):
        raise ExportError(f"{where} has shape {tuple(tensor.shape)}, the model takes ({', '.join(map(str, sizes))}).")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ExportError(f"{where} has {int((~tensor.isfinite()).sum())} values that are not finite: a range cannot be made of them.")
