"""Runs an exported file in onnxruntime and compares it with PyTorch."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffq_fx import kernels
from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export.onnx.examples import FORWARD_ERRORS, ExportExample, Hidden
from diffq_fx.export.onnx.files import load_graph
from diffq_fx.export.onnx.saving import UNFOLDED
from diffq_fx.export.onnx.sessions import EXACT, FREED, difference_of, open_session, run_session, to_numpy
from diffq_fx.export.onnx.tracing import TracedModel

TOLERANCE = 1e-4
"""Largest difference allowed, as a part of the output's largest value; a model in float16 gets a few of its own steps."""
_STEPS = 4
_ROUNDINGS = 4
"""How many times the distance that rounding inputs makes by itself is allowed to a file with integer products."""
_LAST_DIGITS, _MOVES = 16, 8
"""Steps of its type that an input moves by, and how often, where it is asked how much the model makes of them: sums in another order
differ by as much."""
_SEED = 0
_SIDES = ("PyTorch", "onnxruntime")
_SEE_SOMETHING = (
    "sees nothing: of such a row attention makes 0 or NaN in PyTorch and an average in onnxruntime. "
    "Give every row of example_inputs a place that it sees"
)
_REFUSALS = (DiffQError, *FORWARD_ERRORS)

_Outputs = Mapping[str, np.ndarray]


class _BlindRowError(Exception):
    """What differs hangs on a row of a mask that sees nothing."""


class _UnsteadyError(ExportError):
    """No two programs agree on what differs: the model makes much of the last digits of its inputs."""


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
    rounding_relative_error: float
    """The same with inputs of integer products rounded as in the file, and products in float."""
    operators: dict[str, int]
    """Operators that onnxruntime ran, and how often, in one inference."""
    dequantized: tuple[str, ...]
    """Names of the DequantizeLinear nodes among them: weights that are dequantized at every run."""
    remark: str
    """What was compared, if not everything: only what a mask shows, since the rest differs."""


@dataclass(frozen=True)
class DraftFiles:
    """The files of one draft; a large one is run as a copy (see :func:`.saving.save_unfolded`)."""

    published: Path
    entries: Mapping[str, str]
    """The session entries that it asks for."""
    fast: Path
    """The published file as it is run."""
    exact: Path
    """The same numbers with activations that are not rounded in the graph; ``fast`` itself if it rounds none there."""
    rounded: Path
    """Float products of activations that are rounded in the graph; ``exact`` itself if there are none."""


class _Comparison:
    """One file against the model, on any inputs."""

    def __init__(self, path: Path, reference: nn.Module, example: ExportExample, session: Any) -> None:
        self.path, self.reference, self.example, self.session = path, reference, example, session
        self.hidden: Hidden | None = None
        """The user's mask, if only what it shows is the same."""

    def found(self, inputs: ExportExample) -> _Outputs:
        """What the file makes of these inputs."""
        return _run(self.session, inputs, self.path)

    def check(self, found: _Outputs, expected: list[np.ndarray], inputs: ExportExample) -> tuple[float, float]:
        """The differences of everything, or else of what a mask shows."""
        try:
            return compare_outputs(found, expected)
        except ExportError as error:
            for here, of_user in zip(inputs.hidden, self.example.hidden, strict=False):
                shown = {name: here.without(value) for name, value in found.items()}
                with suppress(ExportError):
                    errors = compare_outputs(shown, [here.without(value) for value in expected])
                    self.hidden = of_user
                    return errors
            for here, of_user in zip(inputs.hidden, self.example.hidden, strict=False):
                with suppress(*_REFUSALS):
                    shown = here.shown(inputs)
                    compare_outputs(self.found(shown), _expected(self.reference, shown))  # so it is the rows that see nothing
                    raise _BlindRowError(f"{error}. {self._blind_rows(of_user)}") from error
            if (own := _own_change(self.reference, inputs, expected)) > TOLERANCE:
                raise _UnsteadyError(
                    f"{error}; where the inputs change in their last digits PyTorch's own outputs change by {own:.3g} of their largest "
                    "value, as they do after a sort of near ties or a difference of large numbers"
                ) from error
            raise

    def remark(self) -> str:
        if self.hidden is None:
            return ""
        blind = self._blind_rows(self.hidden) or (
            "Where a row of attention sees nothing (padding on the left of a causal model) PyTorch gives 0 and onnxruntime an average. "
            "Leave these places out"
        )
        return (
            f"the outputs agree with PyTorch's where the mask shows a place, and differ where it hides one: {blind[0].lower()}{blind[1:]}"
        )

    def _blind_rows(self, hidden: Hidden) -> str:
        rows = ", ".join(map(str, hidden.rows.nonzero()[0]))
        return rows and f"Row {rows} of input {self.session.get_inputs()[hidden.number].name!r} {_SEE_SOMETHING}"


def check_parity(
    files: DraftFiles, reference: nn.Module, example: ExportExample, traced: TracedModel, typical: ExportExample | None = None
) -> Parity:
    """Compare a file with the model that it was made of, on fresh random inputs at the example's size and at others.

    Args:
        files: what is compared.
        reference: the model, in eval mode, with the numbers that the file has.
        example: the user's example.
        traced: tells which sizes are dynamic, and at which ones a trace may be wrong.
        typical: inputs for the error of rounded activations; None for the random ones.

    Raises:
        SizeError: the model does not run at another size, or the file has dynamic sizes and differs at one.
        ExportError: onnxruntime refuses the file, or an output differs by more than the tolerance where no activation is rounded.
    """
    entries = {**files.entries, **EXACT}
    session = open_session(files.exact, 0, entries, **FREED)
    exact = _Comparison(files.exact, reference, example, session)
    generator = torch.Generator().manual_seed(_SEED)
    worst, compared = (0.0, 0.0), []
    for sizes in [traced.sizes, traced.other_sizes] if traced.sizes else [traced.sizes]:
        with _at(sizes):
            fresh = _that_runs(reference, example, generator, traced.shapes(sizes))
            expected = _expected(reference, fresh)  # a second run: a model that keeps something differs from its first
            worst = max(worst, exact.check(exact.found(fresh), expected, fresh), key=lambda pair: pair[1])
        compared.append((fresh, expected))
    for sizes in traced.turning_points:
        try:
            fresh = example.redrawn(generator, traced.shapes(sizes))
            outputs = exact.found(fresh), _expected(reference, fresh)
        except _REFUSALS:
            continue  # no size that both take
        with _at(sizes):
            exact.check(*outputs, fresh)
    remark = exact.remark()
    del exact, session  # a session holds the weights, those that it has folded as floats: one at a time
    compared = compared if typical is None else [(typical, _expected(reference, typical))]
    fast_worst, ran = _as_it_runs(files, compared)
    rounding = worst[1]
    if files.rounded != files.exact:
        session = open_session(files.rounded, 0, entries, **FREED)
        _check_rounding(fast_worst, rounding := _worst(session, files.rounded, compared))
    dequantized = _dequantized_at_run(files) if any(operator == "DequantizeLinear" for _, operator in ran) else ()
    return Parity(*worst, fast_worst, rounding, dict(Counter(operator for _, operator in ran)), dequantized, remark)


def _as_it_runs(files: DraftFiles, compared: list[tuple[ExportExample, list[np.ndarray]]]) -> tuple[float, list[tuple[str, str]]]:
    """The largest relative difference of the file as it runs by default, and the kernels of its last run."""
    profile = str(files.fast.with_name("profile"))
    session = open_session(files.fast, 0, files.entries, **FREED, enable_profiling=True, profile_file_prefix=profile)
    worst = _worst(session, files.fast, compared)
    ran = _kernels(Path(session.end_profiling()))
    return worst, [kernel for kernel in ran if not kernel[0].startswith(UNFOLDED)]


def _worst(session: Any, path: Path, compared: list[tuple[ExportExample, list[np.ndarray]]]) -> float:
    """The largest relative difference over the outputs and inputs."""
    runs = ((_run(session, inputs, path).items(), expected) for inputs, expected in compared)
    pairs = (pair for found, expected in runs for pair in zip(found, expected, strict=True))
    return max((difference_of(name, theirs, ours, _SIDES).max_relative for (name, ours), theirs in pairs), default=0.0)


def _check_rounding(found: float, predicted: float) -> None:
    """Refuse integer products that are further off than rounding their inputs: a few layers on, the same rounding is off in another way."""
    if math.isfinite(predicted) and not found <= _ROUNDINGS * predicted + TOLERANCE:
        raise ExportError(
            f"as the file runs an output differs from PyTorch by {found:.3g} of its largest value, and by {predicted:.3g} where inputs "
            "of products are rounded to 8 bits but multiplied in float. The file was not written; please report this model."
        )


def _run(session: Any, inputs: ExportExample, path: Path) -> _Outputs:
    """What a file makes of these inputs, in the memory that PyTorch's weights in float took, and gives back."""
    kernels.release()
    feeds = {entry.name: to_numpy(tensor).copy() for entry, tensor in zip(session.get_inputs(), inputs.tensors, strict=True)}
    outputs = run_session(session, feeds, path)
    kernels.release()
    return outputs


def _expected(reference: nn.Module, inputs: ExportExample) -> list[np.ndarray]:
    return [to_numpy(leaf) for leaf in inputs.run(reference) if isinstance(leaf, torch.Tensor)]


def _own_change(reference: nn.Module, inputs: ExportExample, expected: list[np.ndarray]) -> float:
    """How far a model's outputs move, relative to their largest value, where its inputs move by a few steps of their type."""
    generator = torch.Generator().manual_seed(_SEED)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        steps = torch.randint(-_LAST_DIGITS, _LAST_DIGITS + 1, tensor.shape, generator=generator).to(tensor)
        return tensor * (1 + steps * torch.finfo(tensor.dtype).eps)

    with suppress(*_REFUSALS):
        runs = (zip(expected, _expected(reference, inputs.map(move)), strict=True) for _ in range(_MOVES))
        return max(difference_of("", *pair).max_relative for run in runs for pair in run)
    return 0.0


def _dequantized_at_run(files: DraftFiles) -> tuple[str, ...]:
    """Names of the file's nodes whose weights onnxruntime dequantizes at every run.

    It inlines calls of functions and gives what was in them names of its own, but not their results.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        open_session(files.fast, 0, files.entries, optimized_model_filepath=str(optimized))
        left = [node for node in load_graph(optimized).graph.node if node.op_type == "DequantizeLinear"]
    names = {output: node.name for node in load_graph(files.published).graph.node for output in node.output}
    return tuple(names[node.output[0]] for node in left if node.output[0] in names)


@contextmanager
def _at(sizes: Mapping[str, int]) -> Iterator[None]:
    """Turn an error into one that names the sizes, if any is dynamic."""
    try:
        yield
    except _BlindRowError as error:
        raise ExportError(str(error)) from error
    except _REFUSALS as error:
        if sizes:
            raise SizeError(f"at {', '.join(f'{name}={size}' for name, size in sizes.items())} {error}") from error
        advice = "verify=False writes it without a comparison" if isinstance(error, _UnsteadyError) else "please report this model"
        raise ExportError(f"{error}. The file was not written; {advice}.") from error


def _that_runs(reference: nn.Module, example: ExportExample, generator: torch.Generator, shapes: list[tuple[int, ...]]) -> ExportExample:
    """Fresh inputs; the example's own integers, or own values, where the model refuses other ones or makes nothing finite of them."""
    kept: list[Callable[[torch.Tensor], bool]] = [lambda _: False, lambda tensor: not tensor.is_floating_point(), lambda _: True]
    ran: list[ExportExample] = []
    for keep, of in product(kept, (example, example.lengthened(shapes))):
        fresh = of.redrawn(generator, shapes, keep)
        try:
            leaves = fresh.run(reference)
        except FORWARD_ERRORS:
            continue
        if all(bool(leaf.isfinite().all()) for leaf in leaves if isinstance(leaf, torch.Tensor)):
            return fresh
        ran.append(fresh)
    return ran[0] if ran else example.redrawn(generator, shapes, kept[-1])


def compare_outputs(found: _Outputs, expected: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference, and the largest relative to the output's largest value.

    Raises:
        DiffQError: The outputs do not fit.
        ExportError: They differ by more than the tolerance.

    Example:
        >>> compare_outputs({"y": np.array([1.0, 2.0])}, [np.array([1.0, 2.00001])])[1] < 1e-5
        True
    """
    if len(found) != len(expected):
        raise DiffQError(f"the file has {len(found)} outputs {list(found)}, the model returns {len(expected)} tensors")
    worst_abs, worst_relative = 0.0, 0.0
    for (name, ours), theirs in zip(found.items(), expected, strict=True):
        difference = difference_of(name, theirs, ours, _SIDES)
        allowed = max(TOLERANCE, _STEPS * float(np.finfo(theirs.dtype).eps)) if theirs.dtype.kind == "f" else 0.0
        if not difference.max_relative <= allowed:
            raise ExportError(
                f"output {name!r} differs from PyTorch by {difference.max_abs:.3g}, {difference.max_relative:.3g} of its largest value "
                f"(allowed: {allowed:.0e})"
            )
        worst_abs, worst_relative = max(worst_abs, difference.max_abs), max(worst_relative, difference.max_relative)
    return worst_abs, worst_relative


def _kernels(profile: Path) -> list[tuple[str, str]]:
    """(node, operator) of the last inference in a profile of onnxruntime."""
    events = json.loads(profile.read_text())
    profile.unlink()
    last = max((event["ts"] for event in events if event.get("name") == "model_run"), default=0)
    suffix = "_kernel_time"
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix)]
    return [(event["name"].removesuffix(suffix), event["args"]["op_name"]) for event in kernels if event["ts"] >= last]
