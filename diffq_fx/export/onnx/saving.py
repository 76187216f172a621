"""Writes a model to disk whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from diffq_fx.errors import ExportError

_PROTOBUF_LIMIT = 2**31 - 2**24
"""Bytes that one protobuf file can hold, less some room for what is not a tensor."""


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A folder beside the target, gone at the end whatever happens.

    Raises:
        ExportError: The target's folder does not exist or cannot be written, or the target is a folder.
    """
    if path.is_dir():
        raise ExportError(f"cannot write {str(path)!r}: it is a folder.")
    if path.exists() and not os.access(path, os.W_OK):
        raise ExportError(f"cannot write {str(path)!r}: the file is read-only.")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_draft(model: ir.Model, folder: Path, name: str) -> Path:
    """Write a model and check it; the tensors go to a file of their own if they are too large for protobuf.

    Raises:
        ExportError: onnx.checker refuses the model, or the disk does not take it.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    draft = folder / name
    try:
        ir.save(model, draft, external_data=f"{name}.data" if size > _PROTOBUF_LIMIT else None)
        onnx.checker.check_model(str(draft), full_check=True)
    except OSError as error:
        raise ExportError(f"cannot write {name!r}: {error.strerror or error}.") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the exported model: {error}") from error
    return draft


def publish(draft: Path, path: Path) -> int:
    """Put a draft in the place of the target: at no moment is there a half-written file under its name.

    Returns:
        Bytes of all files.

    Raises:
        ExportError: The target cannot be replaced.
    """
    files = sorted(draft.parent.glob(f"{draft.name}*"), key=lambda file: file == draft)  # the data before what reads it
    try:
        total = sum(file.stat().st_size for file in files)
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    return total
