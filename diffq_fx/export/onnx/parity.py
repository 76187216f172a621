"""Runs an exported file in onnxruntime and compares it with PyTorch: the largest difference, never a cosine."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export.onnx.differences import largest_difference
from diffq_fx.export.onnx.examples import ExportExample
from diffq_fx.export.onnx.files import load_graph
from diffq_fx.export.onnx.sessions import EXACT_LEVEL, open_session, run_session, to_numpy
from diffq_fx.export.onnx.tracing import TracedModel

TOLERANCE = 1e-4
"""Largest difference allowed, as a part of the output's largest value; a model in float16 gets a few of its own steps."""
_STEPS = 4
_SEED = 0

_Outputs = Mapping[str, np.ndarray]


class SizeError(ExportError):
    """A file whose sizes are dynamic is wrong at one of them."""


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
    leaves_out_hidden: bool
    """Whether only what a mask shows was compared, since the rest differs."""


@dataclass(frozen=True)
class DraftFiles:
    """The files of one draft."""

    published: Path
    entries: Mapping[str, str]
    """The session entries that it asks for."""
    exact: Path
    """The same numbers with activations that are not rounded in the graph; the published file itself if it rounds none there."""


def check_parity(
    files: DraftFiles, reference: nn.Module, example: ExportExample, traced: TracedModel, typical: ExportExample | None = None
) -> Parity:
    """Compare a file with the model that it was made of, on fresh random inputs at the example's size and at another batch.

    Args:
        files: what is compared.
        reference: the model, in eval mode, with the numbers that the file has.
        example: the user's example.
        traced: tells which sizes are dynamic.
        typical: inputs for the error of rounded activations; None for the random ones.

    Raises:
        SizeError: the model does not run at another size, or the file has dynamic sizes and differs at one.
        ExportError: onnxruntime refuses the file, or an output differs by more than the tolerance where no activation is rounded.
    """
    exact = open_session(files.exact, 0, {**files.entries, **dict([EXACT_LEVEL])})
    fast = open_session(files.published, 0, files.entries, files.published.with_name("profile"))
    generator = torch.Generator().manual_seed(_SEED)
    worst, fast_worst, hidden = (0.0, 0.0), 0.0, False
    for sizes in [traced.sizes, traced.other_sizes] if traced.sizes else [traced.sizes]:
        fresh = _that_runs(reference, example, generator, _shapes(traced, sizes))
        with _at(sizes):
            found, expected = _both(exact, files.exact, reference, fresh)
            errors, only_seen = _compared(found, expected, fresh.masks)
        hidden |= only_seen
        worst = max(worst, errors, key=lambda pair: pair[1])
        if typical is None:
            fast_worst = max(fast_worst, _relative(*_both(fast, files.published, reference, fresh)))
    if typical is not None:
        fast_worst = _relative(*_both(fast, files.published, reference, typical))
    if traced.single:
        _check_single(exact, files.exact, reference, example.redrawn(generator, _shapes(traced, traced.single)), traced.single)
    kernels = _kernels(Path(fast.end_profiling()))
    dequantized = _dequantized_at_run(files) if any(operator == "DequantizeLinear" for _, operator in kernels) else ()
    return Parity(*worst, fast_worst, dict(Counter(operator for _, operator in kernels)), dequantized, hidden)


def _dequantized_at_run(files: DraftFiles) -> tuple[str, ...]:
    """Names of the file's nodes whose weights onnxruntime dequantizes at every run.

    It inlines calls of functions and gives what was in them names of its own, but not their results.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        open_session(files.published, 0, files.entries, optimized=optimized)
        left = [node for node in load_graph(optimized).graph.node if node.op_type == "DequantizeLinear"]
    names = {output: node.name for node in load_graph(files.published).graph.node for output in node.output}
    return tuple(names[node.output[0]] for node in left if node.output[0] in names)


def _shapes(traced: TracedModel, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    return [tuple(size if isinstance(size, int) else 1 for size in shape.evaluate(sizes)) for shape in traced.input_shapes]


@contextmanager
def _at(sizes: Mapping[str, int]) -> Iterator[None]:
    """Turn an error into one that names the sizes, if any is dynamic."""
    try:
        yield
    except (DiffQError, RuntimeError, ValueError, IndexError) as error:
        if not sizes:
            raise ExportError(f"{error}. The file was not written; please report this model.") from error
        raise SizeError(f"at {', '.join(f'{name}={size}' for name, size in sizes.items())} {error}") from error


def _check_single(session: Any, path: Path, reference: nn.Module, example: ExportExample, sizes: Mapping[str, int]) -> None:
    """Compare at a batch of one, where both run."""
    try:
        found, expected = _both(session, path, reference, example)
    except (DiffQError, RuntimeError, ValueError, IndexError):
        return
    with _at(sizes):
        _compared(found, expected, example.masks)


def _compared(found: _Outputs, expected: list[np.ndarray], masks: list[torch.Tensor]) -> tuple[tuple[float, float], bool]:
    """The differences, and whether they are only those of what a mask shows."""
    try:
        return compare_outputs(found, expected), False
    except ExportError as error:
        return _compare_what_is_seen(found, expected, masks, error), True


def _both(session: Any, path: Path, reference: nn.Module, example: ExportExample) -> tuple[_Outputs, list[np.ndarray]]:
    """What the file and the model make of the same inputs."""
    feeds = {entry.name: to_numpy(tensor).copy() for entry, tensor in zip(session.get_inputs(), example.tensors, strict=True)}
    expected = [to_numpy(leaf) for leaf in example.map(torch.clone).run(reference) if isinstance(leaf, torch.Tensor)]
    return run_session(session, feeds, path), expected


def _compare_what_is_seen(
    found: _Outputs, expected: list[np.ndarray], masks: list[torch.Tensor], error: ExportError
) -> tuple[float, float]:
    """Compare without the places that a mask hides.

    What stands there means nothing, and where they see nothing in turn (padding on the left of a causal model) attention is 0 in PyTorch
    and an average in onnxruntime.
    """
    for mask in masks:
        for hidden in (to_numpy(mask) == value for value in (0, 1)):
            seen = [{name: _without(value, hidden) for name, value in found.items()}, [_without(value, hidden) for value in expected]]
            try:
                return compare_outputs(*seen)
            except ExportError:
                continue
    raise error


def _without(output: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """An output of shape (batch, length, ...) without the places that are hidden; any other as it is."""
    return output[~hidden] if output.shape[:2] == hidden.shape and not hidden.all() else output


def _that_runs(reference: nn.Module, example: ExportExample, generator: torch.Generator, shapes: list[tuple[int, ...]]) -> ExportExample:
    """Fresh inputs; the example's own integers, or own values, where the model refuses other ones or makes nothing finite of them."""
    kept: list[Callable[[torch.Tensor], bool]] = [lambda _: False, lambda tensor: not tensor.is_floating_point(), lambda _: True]
    ran: list[ExportExample] = []
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


def compare_outputs(found: _Outputs, expected: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference, and the largest relative to the output's largest value.

    Raises:
        ExportError: The outputs do not fit, or differ by more than the tolerance.

    Example:
        >>> compare_outputs({"y": np.array([1.0, 2.0])}, [np.array([1.0, 2.00001])])[1] < 1e-5
        True
    """
    if len(found) != len(expected):
        raise ExportError(f"the file has {len(found)} outputs {list(found)}, the model returns {len(expected)} tensors")
    worst_abs, worst_relative = 0.0, 0.0
    for (name, ours), theirs in zip(found.items(), expected, strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(f"output {name!r} has shape {ours.shape} in onnxruntime, {theirs.shape} in PyTorch")
        difference, relative = largest_difference(ours, theirs)
        allowed = max(TOLERANCE, _STEPS * float(np.finfo(theirs.dtype).eps)) if theirs.dtype.kind == "f" else 0.0
        if not relative <= allowed:
            raise ExportError(
                f"output {name!r} differs from PyTorch by {difference:.3g}, {relative:.3g} of its largest value (allowed: {allowed:.0e})"
            )
        worst_abs, worst_relative = max(worst_abs, difference), max(worst_relative, relative)
    return worst_abs, worst_relative


def _relative(found: _Outputs, expected: list[np.ndarray]) -> float:
    return max((largest_difference(ours, theirs)[1] for ours, theirs in zip(found.values(), expected, strict=True)), default=0.0)


def _kernels(profile: Path) -> list[tuple[str, str]]:
    """(node, operator) of the last inference in a profile of onnxruntime."""
    events = json.loads(profile.read_text())
    profile.unlink()
    last = max((event["ts"] for event in events if event.get("name") == "model_run"), default=0)
    suffix = "_kernel_time"
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix)]
    return [(event["name"].removesuffix(suffix), event["args"]["op_name"]) for event in kernels if event["ts"] >= last]
