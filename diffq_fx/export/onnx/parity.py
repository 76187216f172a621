"""Runs an exported file in onnxruntime and compares it with PyTorch: the largest difference, never a cosine."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffq_fx import _compat
from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.examples import Example
from diffq_fx.export.onnx.runtime import to_numpy
from diffq_fx.export.onnx.sessions import EXACT_LEVEL
from diffq_fx.export.onnx.tracing import TracedModel

TOLERANCE = 1e-4
"""Largest difference allowed, as a part of the output's largest value; a model in float16 gets a few of its own steps."""
_STEPS = 4
_SEED = 0


@dataclass(frozen=True)
class Parity:
    """What a run in onnxruntime showed."""

    max_abs_error: float
    max_relative_error: float
    """The largest over the outputs of: largest difference / largest value; with activations that are not rounded."""
    fast_relative_error: float
    """The same for the file as it runs by default."""
    operators: dict[str, int]
    """Operators that onnxruntime ran, and how often, in one inference."""
    dequantized: tuple[str, ...]
    """Names of the DequantizeLinear nodes among them: weights that are dequantized at every run."""


@dataclass(frozen=True)
class DraftFiles:
    """The files of one draft."""

    published: Path
    entries: Mapping[str, str]
    """The session entries that it asks for."""
    exact: Path
    """The same numbers with activations that are not rounded in the graph; the published file itself if it rounds none there."""


def check_parity(files: DraftFiles, reference: nn.Module, example: Example, traced: TracedModel, typical: Example | None = None) -> Parity:
    """Compare a file with the model that it was made of, on fresh random inputs at the example's size and at another batch.

    Args:
        files: what is compared.
        reference: the model, in eval mode, with the numbers that the file has.
        example: the user's example.
        traced: tells which sizes are dynamic.
        typical: inputs for the error of rounded activations; None for the random ones.

    Raises:
        ExportError: onnxruntime refuses the file, or an output differs by more than the tolerance where no activation is rounded.
    """
    exact = _open(files.exact, {**files.entries, **dict([EXACT_LEVEL])})
    fast = _open(files.published, files.entries, profiled=True)
    generator = torch.Generator().manual_seed(_SEED)
    worst, fast_worst = (0.0, 0.0), 0.0
    for sizes in [traced.sizes, traced.other_sizes] if traced.sizes else [traced.sizes]:
        shapes = [tuple(size if isinstance(size, int) else 1 for size in shape.evaluate(sizes)) for shape in traced.input_shapes]
        fresh = _that_runs(reference, example, generator, shapes)
        feeds = {entry.name: to_numpy(tensor).copy() for entry, tensor in zip(exact.get_inputs(), fresh.tensors, strict=True)}
        expected = [to_numpy(leaf) for leaf in fresh.run(reference) if isinstance(leaf, torch.Tensor)]  # may change its arguments
        names = [entry.name for entry in exact.get_outputs()]
        worst = max(worst, compare_outputs(names, _run(exact, feeds), expected), key=lambda pair: pair[1])
        if typical is None:
            fast_worst = max(fast_worst, _relative(_run(fast, feeds), expected))
    if typical is not None:
        feeds = {entry.name: to_numpy(tensor).copy() for entry, tensor in zip(fast.get_inputs(), typical.tensors, strict=True)}
        expected = [to_numpy(leaf) for leaf in typical.run(reference) if isinstance(leaf, torch.Tensor)]
        fast_worst = _relative(_run(fast, feeds), expected)
    kernels = _kernels(Path(fast.end_profiling()))
    dequantized = tuple(name for name, operator in kernels if operator == "DequantizeLinear")
    return Parity(*worst, fast_worst, dict(Counter(operator for _, operator in kernels)), dequantized)


def _that_runs(reference: nn.Module, example: Example, generator: torch.Generator, shapes: list[tuple[int, ...]]) -> Example:
    """Fresh inputs; the example's own integers, or own values, where the model refuses other ones or makes nothing finite of them."""
    kept: list[Callable[[torch.Tensor], bool]] = [lambda _: False, lambda tensor: not tensor.is_floating_point(), lambda _: True]
    ran: list[Example] = []
    for keep in kept:
        fresh = example.redrawn(generator, shapes, keep)
        try:
            leaves = fresh.map(torch.clone).run(reference)
        except (RuntimeError, ValueError, IndexError):
            continue
        if all(bool(leaf.isfinite().all()) for leaf in leaves if isinstance(leaf, torch.Tensor)):
            return fresh
        ran.append(fresh)
    return ran[0] if ran else example.redrawn(generator, shapes, kept[-1])


def compare_outputs(names: list[str], found: list[Any], expected: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference, and the largest relative to the output's largest value.

    Raises:
        ExportError: The outputs do not fit, or differ by more than the tolerance.

    Example:
        >>> compare_outputs(["y"], [np.array([1.0, 2.0])], [np.array([1.0, 2.00001])])[1] < 1e-5
        True
    """
    if len(found) != len(expected):
        raise ExportError(f"the file has {len(found)} outputs {names}, the model returns {len(expected)} tensors.")
    worst_abs, worst_relative = 0.0, 0.0
    for name, ours, theirs in zip(names, found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(f"output {name!r} has shape {ours.shape} in onnxruntime, {theirs.shape} in PyTorch.")
        difference, relative = _difference(np.asarray(ours), theirs)
        allowed = max(TOLERANCE, _STEPS * float(np.finfo(theirs.dtype).eps)) if theirs.dtype.kind == "f" else 0.0
        if not relative <= allowed:
            raise ExportError(
                f"output {name!r} differs from PyTorch by {difference:.3g}, {relative:.3g} of its largest value "
                f"(allowed: {allowed:.0e}). The file was not written; please report this model."
            )
        worst_abs, worst_relative = max(worst_abs, difference), max(worst_relative, relative)
    return worst_abs, worst_relative


def _relative(found: list[Any], expected: list[np.ndarray]) -> float:
    return max((_difference(np.asarray(ours), theirs)[1] for ours, theirs in zip(found, expected, strict=True)), default=0.0)


def _difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    if found.size == 0:
        return 0.0, 0.0
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return float("inf"), float("inf")
    found, expected = np.where(finite, found, 0.0), np.where(finite, expected, 0.0)
    difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    return difference, 0.0 if difference == 0 else difference / largest if largest > 0 else float("inf")


def _open(path: Path, entries: Mapping[str, str], *, profiled: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = 4
    if profiled:
        options.enable_profiling = True
        options.profile_file_prefix = str(path.with_name("profile"))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _compat.onnxruntime_errors() as error:
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load the file: {error}") from error


def _run(session: Any, feeds: dict[str, np.ndarray]) -> list[Any]:
    try:
        return session.run(None, feeds)
    except _compat.onnxruntime_errors() as error:
        raise ExportError(f"onnxruntime cannot run the file: {error}") from error


def _kernels(profile: Path) -> list[tuple[str, str]]:
    """(node, operator) of the last inference in a profile of onnxruntime."""
    events = json.loads(profile.read_text())
    profile.unlink()
    last = max((event["ts"] for event in events if event.get("name") == "model_run"), default=0)
    suffix = "_kernel_time"
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix)]
    return [(event["name"].removesuffix(suffix), event["args"]["op_name"]) for event in kernels if event["ts"] >= last]
