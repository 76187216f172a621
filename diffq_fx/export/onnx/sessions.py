"""The onnxruntime options that our files want, and that they carry in their metadata."""

from pathlib import Path
from typing import Any

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.metadata import from_props

EXACT_LEVEL = ("session.qdq_matmulnbits_accuracy_level", "1")
"""Keeps activations in float inside fused products."""
_FAST_LEVEL = ("session.qdq_matmulnbits_accuracy_level", "4")
"""Rounds them to int8, block by block."""


def wanted_entries(layout: str) -> dict[str, str]:
    """The session entries that a file of ours asks for.

    Args:
        layout: "onnxruntime" or "qdq".
    """
    return dict([_FAST_LEVEL]) if layout == "onnxruntime" else {}


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

    from diffq_fx.export.onnx.files import load_graph
    from diffq_fx.export.onnx.runtime import session_entries

    if threads < 0:
        raise ValueError(f"threads must be at least 0, got {threads}.")
    model = load_graph(path)
    metadata = from_props({entry.key: entry.value for entry in model.metadata_props})
    if metadata is None:
        raise ExportError(f"session_options: {str(path)!r} was not written by export_onnx; it asks for no options.")
    entries = session_entries(model)
    if exact:
        if metadata.activations != "float":
            raise ExportError(
                f"session_options: {str(path)!r} rounds activations in its graph (activations={metadata.activations!r}); "
                'no option undoes that. Export with activations="float" for a file that can run exactly.'
            )
        entries.update([EXACT_LEVEL])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options
