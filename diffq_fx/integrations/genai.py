"""onnxruntime-genai: folders that it runs, made by its own model builder of the exact levels of a converted decoder."""

import importlib.util
import math
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from safetensors import safe_open
from torch import nn

from diffq_fx.atomic import naming, new_folder
from diffq_fx.errors import ExportError, missing
from diffq_fx.integrations.olive import HEAD, OliveFolder, check_names, tokenizer_for, write_olive
from diffq_fx.integrations.olive_weight import HeldWeight

_FILE = "model.onnx"
_TENSORS = ("qweight", "scales", "qzeros")
_FULL_FLOAT = "1"
"""MatMulNBits: accuracy_level of inputs that stay float32."""


@dataclass(frozen=True)
class GenAIFolder:
    """What :func:`export_genai` wrote."""

    path: Path
    held: dict[str, HeldWeight]
    """By module; a fused one is in parts."""
    in_float: tuple[str, ...]
    """Quantized weights that the runtime has no integers for: their exact values are floats."""
    file_size: int
    """Bytes of the ONNX file with its data."""


def export_genai(model: nn.Module, folder: str | Path, tokenizer: Any, *, exact: bool = False) -> GenAIFolder:
    """Write a converted decoder as a folder that onnxruntime-genai runs on a CPU, with the exact levels.

    The package's own model builder makes it of what :func:`~diffq_fx.integrations.olive.save_olive` writes. Then every level, scale and
    zero point of the file is compared with the model's. An embedding that is the head too lies in the file once, as integers.

    Args:
        model: from ``convert``: a decoder of transformers in whose layers every matrix is quantized, to at most 8 bits.
        folder: to make; there is none of this name yet, or it is empty. It is there when all is done, or not at all.
        tokenizer: the model's, of transformers, or a Hugging Face folder with it.
        exact: keep the inputs of products in float32, so that its greedy tokens are PyTorch's; else they are rounded to 8 bits, which is
            the runtime's fast mode.

    Returns:
        How each weight is held, and the size.

    Raises:
        ExportError: as for :func:`~diffq_fx.integrations.olive.save_olive`; or the builder knows no such architecture, failed, or changed
            a level.
        ImportError: there is no onnxruntime-genai.
        TypeError: neither a tokenizer nor a folder.

    Example: docs/how-to/onnxruntime-genai.md has one from a float model to generated tokens.
    """
    builder = _builder()
    with new_folder(Path(folder), ExportError) as draft:
        (given := draft.parent / "olive").mkdir()
        with naming(folder, ExportError):
            olive = write_olive(model, given, tokenizer, "export_genai")
        _build(builder, olive, draft, exact, type(model).__name__)
        with naming(folder, ExportError):
            _give_rows_to_embedding(draft / _FILE)
        _check_levels(draft / _FILE, olive)
        size = sum(path.stat().st_size for path in draft.glob(f"{_FILE}*"))
    return GenAIFolder(Path(folder), olive.held, olive.in_float, size)


def refuse_unknown(model: nn.Module, tokenizer: Any) -> None:
    """The errors of :func:`export_genai` for an architecture or a tokenizer that it does not know, of a model that is float yet."""
    _builder()
    tokenizer_for(model, tokenizer, "export_genai")
    try:
        check_names(model.state_dict(), type(model).__name__)
    except ExportError as error:
        raise ExportError(f"export_genai: {error}") from error


def _builder() -> Path:
    """The script of the builder. It runs in a process of its own: it changes the logging and the import path of the one that it is in."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or not spec.submodule_search_locations:
        raise missing("onnxruntime-genai", ImportError("No module named 'onnxruntime_genai'"))
    return Path(spec.submodule_search_locations[0]) / "models" / "builder.py"


def _runtime() -> str:
    name, *_ = packages_distributions().get("onnxruntime_genai", ["onnxruntime-genai"])  # or that for a kind of GPU
    return f"{name} {version(name)}"


def _build(builder: Path, olive: OliveFolder, target: Path, exact: bool, architecture: str) -> None:
    options = olive.builder_options | ({"accuracy_level": _FULL_FLOAT} if exact else {})
    options.pop("shared_embeddings", None)  # an embedding that is the head too lies in the file once: it is made readable afterwards
    extra = [f"{name}={value}" for name, value in options.items()]
    folders = ["-i", olive.path, "-o", target, "-c", olive.path.parent / "cache"]
    command = [sys.executable, builder, *folders, "-p", "int4", "-e", "cpu", *(["--extra_options", *extra] if extra else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (target / _FILE).is_file():
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit status {done.returncode}")
        said = last.replace(str(olive.path), architecture)
        raise ExportError(f"export_genai: the model builder of {_runtime()} failed. {said}")


def _give_rows_to_embedding(path: Path) -> None:
    """Shape the scales of an embedding that is the head too as GatherBlockQuantized reads them: a row for each token."""
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "GatherBlockQuantized":
            tokens = tensors[f"{HEAD}.MatMulNBits.qweight"].dims[0]
            for tensor in (tensors[name] for name in node.input[2:]):
                tensor.dims[:] = (tokens, math.prod(tensor.dims) // tokens)
            onnx.save(model, path)


def _check_levels(path: Path, olive: OliveFolder) -> None:
    """Compare every level, scale and zero point of the file with what the builder was given."""
    left = dict(olive.held)
    with safe_open(olive.path / "model.safetensors", "np") as ours:
        for node in ir.load(path).graph:
            if node.op_type != "MatMulNBits":
                continue
            held = [value for value in node.inputs[1:] if value is not None]
            base = str(held[0].name).removesuffix(".MatMulNBits.qweight").replace(".attn.", ".self_attn.")
            modules = [base.replace("qkv_proj", f"{part}_proj") for part in "qkv"] if base.endswith(".qkv_proj") else [base]
            settings = {left.pop(module, (0, 0, 0))[1:] for module in modules}
            same = len(held) == len(_TENSORS) and settings == {(node.attributes["bits"].as_int(), node.attributes["block_size"].as_int())}
            for value, kind in zip(held, _TENSORS, strict=False):
                if same:  # else it may be no module of ours, such as a head in float that was rounded
                    expected = np.concatenate([ours.get_tensor(f"{module}.{kind}").ravel() for module in modules])
                    same = np.array_equal(np.asarray(value.const_value).ravel(), expected)
            if not same:
                raise ExportError(f"export_genai: {_runtime()} made other levels or scales of {base!r} than the model has.")
    if left:
        raise ExportError(f"export_genai: the file of {_runtime()} lacks the levels of {', '.join(map(repr, left))}.")
