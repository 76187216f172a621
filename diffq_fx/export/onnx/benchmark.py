"""Two ONNX files against each other in onnxruntime: latency, difference of their outputs, size.

The two run in turns on the same inputs, A B, B A, A B, ..., so that whatever slows the computer down meets both, and
the ratio is taken pair by pair. Medians and quartiles, never means: the noise of a computer is one-sided.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto
from onnxruntime import InferenceSession

from diffq_fx.arguments import check_whole
from diffq_fx.budget.size import mib
from diffq_fx.errors import DiffQError
from diffq_fx.export.onnx.files import blaming, load_graph, size_bytes
from diffq_fx.export.onnx.metadata import metadata_of
from diffq_fx.export.onnx.sessions import OutputDifference, difference_of, open_session, run_session, session_entries
from diffq_fx.export.onnx.signatures import TensorSignature, index_bounds, make_inputs, pair_signatures, resolve_shapes, signature_of
from diffq_fx.export.onnx.timing import time_in_turns
from diffq_fx.export.onnx.usage import external_locations, find_constants


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The middle half of a set of measurements."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """The quartiles of at least one value.

        Example:
            >>> Quartiles.of([1.0, 2.0, 3.0, 4.0, 5.0])
            Quartiles(q1=2.0, median=3.0, q3=4.0)
        """
        return cls(**dict(zip(("q1", "median", "q3"), np.percentile(values, (25, 50, 75)).tolist(), strict=True)))

    def text(self, form: str) -> str:
        """``median [q1, q3]``, each number in this format."""
        return f"{self.median:{form}} [{self.q1:{form}}, {self.q3:{form}}]"


@dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """Latency, outputs and size of two models on the same inputs."""

    path_a: str
    path_b: str
    a_ms: Quartiles
    """Milliseconds of one run of A."""
    b_ms: Quartiles
    ratio: Quartiles
    """A's time divided by B's, pair by pair: above 1, B is the faster one."""
    outputs: tuple[OutputDifference, ...]
    size_a_mib: float
    """The file and its external data."""
    size_b_mib: float
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    """Input name -> dtype and shape that both were run on."""
    other_names: dict[str, str]
    """Inputs and outputs of A -> what they are called in B, where that differs: these are paired by their order."""
    threads: int
    """Threads inside an operator; 0 for as many as onnxruntime takes by itself."""
    repeats: int
    """Pairs that were timed."""
    seed: int
    session_a: dict[str, str]
    """The onnxruntime session entries that A asks for."""
    session_b: dict[str, str]

    @property
    def pairing(self) -> str:
        """Which inputs and outputs were paired by their order, in a sentence; empty where all names agree."""
        pairs = ", ".join(f"'{name}' with '{other}'" for name, other in self.other_names.items())
        return f"paired by their order: {pairs}" if pairs else ""

    @property
    def worst_output(self) -> OutputDifference:
        """The output with the largest relative difference."""
        return max(self.outputs, key=lambda output: output.max_relative)

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain lists, dicts and numbers."""
        return {**asdict(self), "worst_output": asdict(self.worst_output)}


def compare_latency(
    path_a: str | Path,
    path_b: str | Path,
    *,
    batch: int = 1,
    repeats: int = 100,
    threads: int = 0,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatencyComparison:
    """Run two ONNX files in turns on the same random inputs.

    Both run as their users would: onnxruntime's CPU provider with its default optimizations, and the session entries
    that a file asks for in its metadata (``diffq_fx.session.*``: onnxruntime's own key with ``diffq_fx.`` before it).

    Args:
        path_a: an ONNX file; the inputs are made from its signature.
        path_b: another one, with inputs and outputs of the same types and shapes; what has another name is paired by its position.
        batch: size of open first dimensions.
        repeats: pairs to time, at least 1.
        threads: threads inside an operator; 0 leaves it to onnxruntime.
        seed: of the inputs.
        dims: sizes of other open dimensions, by name, or by ``"input.position"`` for one without; by default as ``export_onnx`` had them.
        on_progress: called after every pair with the pairs done and ``repeats``.

    Returns:
        Latency and spread of each, their ratio, the difference of their outputs, their sizes.

    Raises:
        FileNotFoundError: A file, or one that holds its weights, is missing.
        ValueError: A size is missing, wrong, or names no open dimension.
        DiffQError: A file is not ONNX, cannot be run, or the two do not take the same inputs and give the same outputs.
    """
    for name, value, least in (("repeats", repeats, 1), ("threads", threads, 0)):
        check_whole("compare_latency", name, value, least)
    paths = (path_a, path_b)
    models = [load_graph(path) for path in paths]
    size_a, size_b = map(_mib, paths, models)
    entries = [session_entries(model) for model in models]
    sessions = [open_session(path, threads, asked) for path, asked in zip(paths, entries, strict=True)]
    signature = signature_of(sessions[0].get_inputs())
    shapes = resolve_shapes(signature, batch, {**_sizes_of_examples(models, signature), **(dims or {})})
    inputs_in_b, outputs_in_b = pair_signatures(sessions, paths, shapes)
    inputs = make_inputs(signature, shapes, _bounds_of(models, inputs_in_b), seed)
    both = [inputs, {inputs_in_b[name]: value for name, value in inputs.items()}]
    outputs = _differences(sessions, both, paths, outputs_in_b)
    runs = [partial(session.run, None, each) for session, each in zip(sessions, both, strict=True)]
    a_ms, b_ms = ([1e3 * s for s in times] for times in time_in_turns(runs, turns=repeats, on_progress=on_progress))
    return LatencyComparison(
        path_a=str(path_a),
        path_b=str(path_b),
        a_ms=Quartiles.of(a_ms),
        b_ms=Quartiles.of(b_ms),
        ratio=Quartiles.of([time_a / time_b for time_a, time_b in zip(a_ms, b_ms, strict=True)]),
        outputs=outputs,
        size_a_mib=size_a,
        size_b_mib=size_b,
        inputs={name: (str(value.dtype), value.shape) for name, value in inputs.items()},
        other_names={x: y for x, y in [*inputs_in_b.items(), *outputs_in_b.items()] if x != y},
        threads=threads,
        repeats=repeats,
        seed=seed,
        session_a=entries[0],
        session_b=entries[1],
    )


def _bounds_of(models: Sequence[ModelProto], names_in_b: Mapping[str, str]) -> dict[str, int]:
    """The bounds of A's inputs, of what each selects from in either model."""
    found = index_bounds(models)
    return {name: min(rows) for name, other in names_in_b.items() if (rows := [found[key] for key in (name, other) if key in found])}


def _differences(
    sessions: Sequence[InferenceSession],
    inputs: Sequence[Mapping[str, np.ndarray]],
    paths: Sequence[str | Path],
    names_in_b: Mapping[str, str],
) -> tuple[OutputDifference, ...]:
    try:
        of_a, of_b = [run_session(session, each, path) for session, each, path in zip(sessions, inputs, paths, strict=True)]
    except DiffQError as error:
        raise DiffQError(
            f"{error}\n  Other sizes may suit it: batch and dims (--batch and --dim name=size on the command line)."
        ) from error
    return tuple(difference_of(name, value, of_b[names_in_b[name]]) for name, value in of_a.items())


def _mib(path: str | Path, model: ModelProto) -> float:
    with blaming(path):
        return mib(8 * size_bytes(path, external_locations(find_constants(model))))


def _sizes_of_examples(models: Sequence[ModelProto], signature: Sequence[TensorSignature]) -> dict[str, int]:
    """The sizes but the batch that A's inputs leave open, as they were when one of the files was exported."""
    known = {name: size for model in models if (metadata := metadata_of(model)) for name, size in metadata.sizes.items()}
    batches = {entry.shape[0] for entry in signature if entry.shape}
    return {size: known[size] for entry in signature for size in entry.shape if size in known and size not in batches}
