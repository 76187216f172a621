"""onnxruntime-genai: folders that it runs, made by its own model builder of the exact levels of a converted decoder."""

import copy
import importlib.util
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from diffq_fx.arguments import as_path, check_flags
from diffq_fx.atomic import naming, new_folder
from diffq_fx.errors import DiffQWarning, ExportError, first_line, missing
from diffq_fx.example import in_eval
from diffq_fx.integrations.olive import HEAD, OliveFolder, check_names, tokenizer_for, write_olive
from diffq_fx.integrations.olive_weight import HeldWeight

_FILE, _SETTINGS = "model.onnx", "genai_config.json"
_OF_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TENSORS = ("qweight", "scales", "qzeros")
_FULL_FLOAT, _INPUTS_OF_8_BITS = 1, 4
"""MatMulNBits: accuracy_level of inputs that stay float32, and of those that the runtime rounds."""
_ANOTHER_WAY = 'export_onnx(..., cache=True, runtime="onnxruntime")'
_CHECKED_TOKENS, _LONGEST_CHECK = 32, 256
_TOLERANCE = 1e-3
"""Relative difference of logits: float32 in another order gives some 1e-6, the least other computation that was met 5e-3."""


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
    zero point of the file is compared with the model's, and so are the logits of some random tokens, with products
    in float32. An embedding that is the head too lies in the file once, as integers.

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
            a level; or the runtime computes something else of them.
        ImportError: there is no onnxruntime-genai.
        TypeError: neither a tokenizer nor a folder.

    Warns:
        DiffQWarning: the runtime cannot read the tokenizer, or containers are much larger than what was learned.

    Example: docs/how-to/onnxruntime-genai.md has one from a float model to generated tokens.
    """
    builder = _builder()
    check_flags("export_genai", exact=exact)
    target = as_path("export_genai", "folder", folder)
    with new_folder(target, ExportError) as draft:
        (given := draft.parent / "olive").mkdir()
        with naming(folder, ExportError):
            olive = write_olive(model, given, tokenizer, "export_genai")
        _build(builder, olive, draft, type(model).__name__)
        with _reading_what_was_built():
            with naming(folder, ExportError):
                _give_rows_to_embedding(draft / _FILE)
            _check_levels(draft / _FILE, olive)
            tokens = _tokens_to_check(json.loads((draft / _SETTINGS).read_text())["model"], getattr(model.config, "sliding_window", None))
        _check_run(draft, model, tokens)
        if not exact:
            with naming(folder, ExportError):
                _round_inputs(draft / _FILE)
        size = sum(path.stat().st_size for path in draft.glob(f"{_FILE}*"))
    return GenAIFolder(target, olive.held, olive.in_float, size)


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


def _build(builder: Path, olive: OliveFolder, target: Path, architecture: str) -> None:
    options = olive.builder_options | {"accuracy_level": str(_FULL_FLOAT)}
    options.pop("shared_embeddings", None)  # an embedding that is the head too lies in the file once: it is made readable afterwards
    extra = [f"{name}={value}" for name, value in options.items()]
    folders = ["-i", olive.path, "-o", target, "-c", olive.path.parent / "cache"]
    command = [sys.executable, builder, *folders, "-p", "int4", "-e", "cpu", "--extra_options", *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = (_FILE, _SETTINGS, *(name for name in _OF_TOKENIZER if (olive.path / name).is_file()))
    lacking = ", ".join(name for name in expected if not (target / name).is_file())
    if done.returncode or lacking:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit status {done.returncode}")
        said = last.replace(str(olive.path), architecture) if done.returncode else f"It wrote no {lacking}"
        raise ExportError(
            f"export_genai: the model builder of {_runtime()} failed. {said.removesuffix('.')}. Where it lacks the architecture or a "
            f"setting of it, use {_ANOTHER_WAY}."
        )


@contextmanager
def _reading_what_was_built() -> Iterator[None]:
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, DecodeError) as error:
        raise ExportError(f"export_genai: what the model builder of {_runtime()} wrote is damaged. {first_line(error)}") from error


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


def _round_inputs(path: Path) -> None:
    """Have the runtime round the inputs of products to 8 bits."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = _INPUTS_OF_8_BITS
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


def _check_run(folder: Path, model: nn.Module, tokens: NDArray[np.int32]) -> None:
    """Compare the runtime's logits with the model's in float32, since the builder has its own form of each architecture."""
    whole: Any = model if next(model.parameters()).dtype == torch.float32 else copy.deepcopy(model).float()
    runtime: Any = importlib.import_module("onnxruntime_genai")  # its names are made at run time
    try:
        loaded = runtime.Model(str(folder))
        theirs = _logits_of_runtime(runtime, loaded, tokens)
    except Exception as error:  # the runtime raises bare ones too
        error.__traceback__ = None  # its frames hold the runtime's model
        said = _first_line_of(error).replace(f"{folder}/", "")
        raise ExportError(
            f"export_genai: {_runtime()} cannot run what its builder made of a {type(model).__name__}: {said.removesuffix('.')}. "
            f"Use {_ANOTHER_WAY}."
        ) from error
    with in_eval(whole), torch.no_grad():
        ours = whole(input_ids=torch.from_numpy(tokens)[None].long().to(whole.device), use_cache=False).logits[0].cpu()
    ours, theirs = (each.double() - each.double().mean(-1, keepdim=True) for each in (ours, torch.from_numpy(theirs)))
    difference = float((ours - theirs).norm() / ours.norm())
    if not difference <= _TOLERANCE:
        raise ExportError(
            f"export_genai: {_runtime()} computes something else than this {type(model).__name__}: over {len(tokens)} tokens its logits "
            f"differ by {difference:.2g} of their norm, and {_TOLERANCE:g} is allowed. Use {_ANOTHER_WAY}."
        )
    try:
        runtime.Tokenizer(loaded)
    except (OSError, RuntimeError, ValueError) as error:
        said = f"{_runtime()} cannot read this tokenizer ({_first_line_of(error)}): it gets tokens from the folder, and no texts."
        warnings.warn(f"export_genai: {said}", DiffQWarning, stacklevel=3)


def _first_line_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tokens_to_check(settings: dict[str, Any], window: int | None) -> NDArray[np.int32]:
    """Random ones, none of them special to the runtime; beyond a sliding window and its cache where that is short."""
    count = beyond if window and (beyond := 2 * window + 2) <= _LONGEST_CHECK else _CHECKED_TOKENS
    special = np.hstack([settings.get(name) or [] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] + [0])
    usual = np.setdiff1d(np.arange(settings["vocab_size"]), special)
    return np.random.default_rng(0).choice(usual, min(max(count, _CHECKED_TOKENS), settings["context_length"])).astype(np.int32)


def _logits_of_runtime(runtime: Any, model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Of each token; the last two are given one by one, as in a generation."""
    search = runtime.GeneratorParams(model)
    search.set_search_options(max_length=len(tokens), do_sample=False)
    generator = runtime.Generator(model, search)
    logits = []
    for part in (tokens[:-2], tokens[-2:-1], tokens[-1:]):
        generator.append_tokens(part)
        logits.append(np.array(generator.get_output("logits")[0]))
    return np.concatenate(logits)
