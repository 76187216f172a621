"""onnxruntime sessions with the options that our files want, and that they carry in their metadata; and how far two runs are apart.

A file may ask for session entries there: ``diffq_fx.session.qdq_matmulnbits_accuracy_level = 4`` sets onnxruntime's entry of that name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffq_fx import _compat
from diffq_fx.arguments import check_flags, check_whole
from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export.onnx.files import load_graph
from diffq_fx.export.onnx.metadata import PREFIX, metadata_of

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

_LEVEL = "session.qdq_matmulnbits_accuracy_level"
EXACT = {_LEVEL: "1"}
"""Keeps activations in float inside fused products."""
_FAST = {_LEVEL: "4"}
"""Rounds them to int8, block by block."""
FREED: Mapping[str, Any] = {"enable_cpu_mem_arena": False, "enable_mem_pattern": False}
"""Options of a session that give back what a run has taken."""


def wanted_entries(layout: str) -> dict[str, str]:
    """The session entries that a file of ours asks for."""
    return dict(_FAST) if layout == "onnxruntime" else {}


def session_entries(model: "ModelProto") -> dict[str, str]:
    """The session entries that a file asks for in its metadata: onnxruntime's key -> value.

    An error for any that no file of ours needs: with others onnxruntime reads from elsewhere.
    """
    props = {str(entry.key): entry.value for entry in model.metadata_props}  # protobuf gives bytes for what is no text
    entries = {key.removeprefix(PREFIX): value for key, value in props.items() if key.startswith(f"{PREFIX}session.")}
    if others := sorted(entries.keys() - {_LEVEL}):
        raise ExportError(f"the file asks for the session entry '{others[0]}', which no exported file needs. Export the model again.")
    return entries


def session_options(path: str | Path, *, exact: bool = False, threads: int = 0) -> Any:
    """The onnxruntime options for an exported file: all graph optimizations and the entries that the file asks for.

    Without them the file runs as well; with them it runs as it was measured.

    Args:
        path: a file of ``export_onnx``.
        exact: keep activations in float, so that the outputs are within 1e-4 of PyTorch's, relative to their largest value. This is
            slower: up to six times slower than float for one row of 8-bit weights.
        threads: threads inside an operator, 1 or more; 0 leaves it to onnxruntime.

    Returns:
        Options for ``onnxruntime.InferenceSession(path, options)``.

    Raises:
        ExportError: ``diffq_fx`` has not written the file, or ``exact`` is asked of one whose graph rounds activations
            (``activations="dynamic"`` or ``"int8"``), which no option undoes.
        FileNotFoundError: There is no such file.
        ValueError: ``threads`` is negative.

    Example:
        >>> import os, tempfile, torch
        >>> from diffq_fx import convert, prepare
        >>> from diffq_fx.methods import STE
        >>> from diffq_fx.export import export_onnx
        >>> model, x = torch.nn.Linear(64, 64), torch.randn(1, 64)
        >>> path = os.path.join(tempfile.mkdtemp(), "model.onnx")
        >>> result = export_onnx(convert(prepare(model, x, STE(bits=4))), x, path)
        >>> session_options(path, exact=True).get_session_config_entry("session.qdq_matmulnbits_accuracy_level")
        '1'
    """
    import onnxruntime

    check_flags("session_options", exact=exact)
    check_whole("session_options", "threads", threads, 0)
    model = load_graph(path)
    metadata = metadata_of(model)
    if metadata is None:
        raise ExportError(f"session_options: {str(path)!r} was not written by export_onnx; it asks for no options.")
    entries = session_entries(model)
    if exact:
        if metadata.activations != "float":
            raise ExportError(
                f"session_options: {str(path)!r} rounds activations in its graph (activations={metadata.activations!r}); "
                'no option undoes that. Export with activations="float" for a file that can run exactly.'
            )
        entries |= EXACT
    options = _options(threads, entries)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return options


def _options(threads: int, entries: Mapping[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(path: str | Path, threads: int, entries: Mapping[str, str], **options: Any) -> "InferenceSession":
    """Load a file with onnxruntime's CPU provider.

    Args:
        path: an ONNX file.
        threads: threads inside an operator; 0 leaves it to onnxruntime.
        entries: session entries, see :func:`session_entries`.
        options: other attributes of ``onnxruntime.SessionOptions``.

    Raises:
        DiffQError: onnxruntime cannot load the file.
    """
    import onnxruntime

    # Without this the threads of the model that has just run keep spinning and slow down the one whose turn it is.
    settings = _options(threads, {"session.force_spinning_stop": "1", **entries})
    settings.log_severity_level = 4  # what goes wrong is raised, not logged
    for name, value in options.items():
        setattr(settings, name, value)
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except _compat.onnxruntime_errors() as error:
        raise DiffQError(f"onnxruntime {onnxruntime.__version__} cannot load '{path}': {str(error).strip()}") from error


def run_session(session: "InferenceSession", inputs: Mapping[str, np.ndarray], path: str | Path) -> dict[str, np.ndarray]:
    """Run a session of the file ``path`` once: input name -> value, output name -> value.

    Raises:
        DiffQError: onnxruntime fails on these inputs, or an output is not a tensor.
    """
    try:
        values: Sequence[Any] = session.run(None, dict(inputs))
    except _compat.onnxruntime_errors() as error:
        shapes = ", ".join(f"'{name}' {list(value.shape)}" for name, value in inputs.items())
        raise DiffQError(f"onnxruntime cannot run '{path}' on inputs {shapes}: {str(error).strip()}") from error
    outputs = {entry.name: value for entry, value in zip(session.get_outputs(), values, strict=True)}
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray):
            raise DiffQError(f"output '{name}' of '{path}' is a {type(value).__name__}: only tensors can be compared.")
    return outputs


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as onnxruntime takes it; bfloat16, which numpy does not have, in float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """How far one output of B is from that of A: the largest difference, never a cosine."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    """Largest ``|A - B|``; inf where only one of them is NaN or infinite, or where they are not numbers and differ."""
    max_relative: float
    """``max_abs`` divided by the largest finite ``|A|`` of this output."""


def difference_of(name: str, a: np.ndarray, b: np.ndarray, sides: tuple[str, str] = ("A", "B")) -> OutputDifference:
    """Compare one output.

    Raises:
        DiffQError: The two have other shapes; ``sides`` says where they are from.

    Example:
        >>> difference = difference_of("y", np.array([1.0, -2.0]), np.array([1.0, -2.5]))
        >>> difference.max_abs, difference.max_relative
        (0.5, 0.25)
    """
    if a.shape != b.shape:
        raise DiffQError(f"output '{name}' has shape {list(a.shape)} in {sides[0]} and {list(b.shape)} in {sides[1]} on the same inputs")
    if a.dtype.kind not in "fiub":
        far = math.inf if (a != b).any() else 0.0
        return OutputDifference(name=name, shape=a.shape, max_abs=far, max_relative=far)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    largest = float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0))
    difference = float(np.max(np.where(np.isnan(distance), np.inf, distance), initial=0.0))
    relative = difference / largest if largest else math.inf if difference else 0.0
    return OutputDifference(name=name, shape=a.shape, max_abs=difference, max_relative=relative)
