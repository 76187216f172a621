"""Writes ONNX files: a draft is written and checked in a folder of its own, then takes the place of the target."""

import os
import re
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from diffq_fx.atomic import naming, put_in_place
from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export.onnx.files import blaming, load_graph
from diffq_fx.export.onnx.metadata import metadata_of
from diffq_fx.export.onnx.usage import external_locations, find_constants

_PROTOBUF_LIMIT = 2**31 - 2**24
"""Bytes that one protobuf file can hold, less some room for what is not a tensor."""
UNFOLDED = "unfolded/"
"""So begin the names of the nodes that are computed at every run because :func:`save_unfolded` has it so."""


def save_draft(model: ir.Model, folder: Path, path: Path) -> Path:
    """Write a model into a folder for this draft alone and check it; tensors that are too large for protobuf have a file of their own.

    ``path`` is the file that the draft may become: the second file is called after it.

    Raises:
        ExportError: onnx.checker refuses the model, or the disk does not take it.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    draft = folder / "model.onnx"
    try:
        with naming(path, ExportError):
            folder.mkdir(exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            ir.save(model, draft, external_data=_data_name(path) if size > _PROTOBUF_LIMIT else None)
            onnx.checker.check_model(str(draft), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the exported model: {error}") from error
    return draft


def save_unfolded(path: Path, weights: Iterable[str], folder: Path) -> Path:
    """Write a file anew with the initializers of some weights as the defaults of optional inputs, which are no constants to onnxruntime.

    So they are made in float when they are read, one after the other; to fold them onnxruntime (1.31) needs three to four times their size.
    Its functions are inlined here: onnxruntime would run what it inlines itself before everything else, and all weights were there at once.
    The tensors lie outside of the graph, since onnxruntime maps these into memory and copies others twice.
    """
    model = ir.load(path)
    InlinePass()(model)
    initializers, begins = model.graph.initializers, tuple(f"{weight}." for weight in weights)
    unfolded = {value for name, value in initializers.items() if name.startswith(begins)}
    known = {None, *initializers.values()}
    model.graph.inputs.extend(unfolded)
    for node in model.graph:
        if known.issuperset(node.inputs):
            known.update(node.outputs)
            if not unfolded.isdisjoint(node.inputs):
                unfolded.update(node.outputs)
                node.name = f"{UNFOLDED}{node.outputs[0].name}"
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / path.name, external_data="unfolded.data")
    return folder / path.name


def _data_name(path: Path) -> str:
    """A name for the second file that no file has: neither the user's own, nor what the old file under ``path`` reads."""
    path = Path(os.path.realpath(path))
    names = (f"{path.name}{ending}" for ending in chain((".data",), (f".{number}.data" for number in count(1))))
    return next(name for name in names if not path.with_name(name).exists())


def publish(draft: Path, path: Path) -> int:
    """Put a draft in the place of the target, with the second file that it reads first; that of the old file goes.

    Returns the bytes of all files.

    Raises:
        ExportError: The target cannot be replaced.
    """
    path = Path(os.path.realpath(path))
    obsolete = _own_data_of(path)
    data = [file for file in draft.parent.iterdir() if file != draft]
    with naming(path, ExportError):
        total = sum(file.stat().st_size for file in (draft, *data))
        try:
            for file in data:  # before what reads it
                put_in_place(file, path.with_name(file.name))
            put_in_place(draft, path)
        except OSError:
            obsolete = [path.with_name(file.name) for file in data]
            raise
        finally:
            for file in obsolete:
                file.unlink(missing_ok=True)
    return total


def _own_data_of(path: Path) -> list[Path]:
    """The second file of what an earlier export has left under ``path``."""
    try:
        model = load_graph(path)
        with blaming(path):
            names = external_locations(find_constants(model)) if metadata_of(model) is not None else []
    except (OSError, DiffQError):  # no file, or not one of ours
        return []
    return [path.with_name(name) for name in names if re.fullmatch(rf"{re.escape(path.name)}(\.\d+)?\.data", name)]
