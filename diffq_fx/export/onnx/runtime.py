"""onnxruntime sessions for files as their users would run them, with errors that name the file.

A file may ask for session entries in its metadata: ``diffq_fx.session.disable_quant_qdq = 1`` sets onnxruntime's
``session.disable_quant_qdq``. Nothing here times or compares numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffq_fx import _compat
from diffq_fx.errors import DiffQError
from diffq_fx.export.onnx.metadata import PREFIX
from diffq_fx.export.onnx.random_inputs import TensorSignature

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession


def session_entries(model: "ModelProto") -> dict[str, str]:
    """The onnxruntime session entries that a file asks for in its metadata.

    Args:
        model: a model with ``metadata_props`` such as ``diffq_fx.session.disable_quant_qdq = 1``.

    Returns:
        onnxruntime's key -> value: ``{"session.disable_quant_qdq": "1"}``.
    """
    return {entry.key.removeprefix(PREFIX): entry.value for entry in model.metadata_props if entry.key.startswith(f"{PREFIX}session.")}


def _session_options(threads: int, entries: Mapping[str, str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, not logged
    # Without this the threads of the model that has just run keep spinning and slow down the one whose turn it is.
    for key, value in {"session.force_spinning_stop": "1", **entries}.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(path: str | Path, threads: int, entries: Mapping[str, str]) -> "InferenceSession":
    """Load a file with onnxruntime's CPU provider.

    Args:
        path: an ONNX file.
        threads: threads inside an operator; 0 leaves it to onnxruntime.
        entries: session entries, see :func:`session_entries`.

    Returns:
        The session.

    Raises:
        DiffQError: onnxruntime cannot load the file.
    """
    import onnxruntime

    options = _session_options(threads, entries)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _compat.onnxruntime_errors() as error:
        raise DiffQError(f"onnxruntime {onnxruntime.__version__} cannot load '{path}': {str(error).strip()}") from error


def run_session(session: "InferenceSession", inputs: Mapping[str, np.ndarray], path: str | Path) -> dict[str, np.ndarray]:
    """Run a session once.

    Args:
        session: of the file ``path``.
        inputs: input name -> value.
        path: for the message.

    Returns:
        Output name -> value.

    Raises:
        DiffQError: onnxruntime fails on these inputs, or an output is not a tensor.
    """
    try:
        values: Sequence[Any] = session.run(None, dict(inputs))
    except _compat.onnxruntime_errors() as error:
        shapes = ", ".join(f"'{name}' {list(value.shape)}" for name, value in inputs.items())
        raise DiffQError(
            f"'{path}' does not run on random inputs {shapes}: {str(error).strip()}\n"
            "  Other sizes may suit it: batch and dims (--batch and --dim name=size on the command line)."
        ) from error
    outputs = {entry.name: value for entry, value in zip(session.get_outputs(), values, strict=True)}
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray):
            raise DiffQError(f"output '{name}' of '{path}' is a {type(value).__name__}: only tensors can be compared.")
    return outputs


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as onnxruntime takes it; bfloat16, which numpy does not have, in float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def signature_of(entries: Sequence[Any]) -> list[TensorSignature]:
    """The signature that ``session.get_inputs()`` or ``session.get_outputs()`` gives."""
    return [
        TensorSignature(name=entry.name, type=entry.type, shape=tuple(None if size == "" else size for size in entry.shape))
        for entry in entries
    ]


def check_same_signature(
    sessions: "Sequence[InferenceSession]", paths: Sequence[str | Path], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that two models take the same inputs and give the same outputs.

    Args:
        sessions: A and B.
        paths: their files, for the message.
        shapes: the inputs' shapes that were made for A, and that B must take.

    Raises:
        DiffQError: An input or output is missing from one of them, or has another type or a shape that B cannot take.
    """
    a, b = sessions
    findings = [
        *_mismatches("input", signature_of(a.get_inputs()), signature_of(b.get_inputs())),
        *_mismatches("output", signature_of(a.get_outputs()), signature_of(b.get_outputs())),
    ]
    for entry in signature_of(b.get_inputs()):
        if entry.name in shapes and not _fits(shapes[entry.name], entry.shape):
            findings.append(f"B's input {entry} does not take A's shape {list(shapes[entry.name])}")
    if findings:
        lines = "".join(f"\n  {finding}" for finding in findings)
        raise DiffQError(
            f"A '{paths[0]}' and B '{paths[1]}' cannot be compared, for their inputs or outputs differ:{lines}\n"
            "  Export both from the same model, with the same names."
        )


def _mismatches(kind: str, in_a: Sequence[TensorSignature], in_b: Sequence[TensorSignature]) -> list[str]:
    entries_a, entries_b = ({entry.name: entry for entry in entries} for entries in (in_a, in_b))
    findings = [f"{kind} {entry} is in A alone" for name, entry in entries_a.items() if name not in entries_b]
    findings += [f"{kind} {entry} is in B alone" for name, entry in entries_b.items() if name not in entries_a]
    for name in entries_a.keys() & entries_b.keys():
        if entries_a[name].type != entries_b[name].type:
            findings.append(f"{kind} {entries_a[name]} of A is {entries_b[name].type} in B")
    return findings


def _fits(shape: tuple[int, ...], declared: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(declared) and all(
        not isinstance(wanted, int) or wanted == size for size, wanted in zip(shape, declared, strict=True)
    )
