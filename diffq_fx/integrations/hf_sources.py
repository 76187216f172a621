"""What ``diffq-fx compress`` reads of a Hugging Face folder: the float model, and unlabelled batches made of texts or tensors for it."""

import inspect
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffq_fx.errors import DiffQError, missing
from diffq_fx.file_kinds import looks_like_safetensors

try:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
except ImportError as error:
    raise missing("transformers", error) from error

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_FEWEST, _MOST_BATCHES, _ROWS = 8, 64, 8
_WINDOW_TOKENS, _TEXT_TOKENS = 256, 128
"""A language model reads windows of so many tokens, one a batch; any other model a text of at most so many."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_BESIDE_WEIGHTS = (".json", ".txt", ".model", ".jinja")


def load_float(folder: Path) -> PreTrainedModel:
    """The model of a folder, of the class that its config.json names, in the type that its weights have.

    Raises:
        DiffQError: the folder is not a model, has no safetensors, is compressed already, lacks weights, or transformers cannot load it.
    """
    if not (folder / "config.json").is_file():
        raise DiffQError(f"'{folder}' is not a Hugging Face folder: it has no config.json, which save_pretrained writes.")
    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # transformers raises whatever a wrong config leads to
        raise DiffQError(f"'{folder / 'config.json'}' is no config of transformers {transformers.__version__}: {error}") from error
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        given = quantization if isinstance(quantization, dict) else vars(quantization)
        raise DiffQError(f"'{folder}' is quantized already, by {given.get('quant_method')}. Give the folder of the float model.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        found = f"{pickles[0]} alone, and a pickle can run code" if pickles else "none"
        raise DiffQError(f"'{folder}' needs its weights as *.safetensors, found {found}. Save the model by save_pretrained.")
    kind = _class_of(config, folder)
    try:
        model, info = kind.from_pretrained(folder, dtype="auto", use_safetensors=True, output_loading_info=True, **_LOCAL)
    except Exception as error:  # damaged files and wrong shapes are of many types
        raise DiffQError(f"transformers cannot load '{folder}' as {kind.__name__}: {type(error).__name__}: {error}") from error
    if lost := sorted(info["missing_keys"]):
        names = ", ".join(map(repr, lost[:5])) + f" and {len(lost) - 5} more" * (len(lost) > 5)
        raise DiffQError(f"'{folder}' lacks weights of a {kind.__name__}: {names}. They would be random numbers.")
    return model.eval()


def _class_of(config: Any, folder: Path) -> Any:
    if not config.architectures:
        return AutoModel
    name = config.architectures[0]
    kind = getattr(transformers, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, PreTrainedModel):
        raise DiffQError(
            f"'{folder / 'config.json'}' names the architecture {name!r}, which transformers {transformers.__version__} does not have; "
            "code that comes with a folder is not run. Give module:function, which returns the model and batches."
        )
    return kind


def batches_of(data: Path, model: PreTrainedModel, folder: Path) -> tuple[list[dict[str, Tensor]], str]:
    """Batches of a file, each the keyword arguments of a call, and what they are in words.

    Args:
        data: texts, one a line; a safetensors file with a tensor of rows for each argument; or a .npy file with the main one.
        model: from :func:`load_float`.
        folder: where its tokenizer is.

    Raises:
        DiffQError: the file is none of these or too short, or texts are given and the folder has no tokenizer.
    """
    with _naming(data):
        if looks_like_safetensors(data):
            return _batches_of_tensors(load_file(data), data, model.dtype)
        content = data.read_bytes()
        if content.startswith(b"\x93NUMPY"):
            array = np.load(data, allow_pickle=False)
            native = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
            return _batches_of_tensors({model.main_input_name: native}, data, model.dtype)
    try:
        lines = [line for line in map(str.strip, content.decode().splitlines()) if line]
    except UnicodeDecodeError as error:
        raise DiffQError(f"--data '{data}' is neither a text in UTF-8 nor a .safetensors or .npy file.") from error
    if not lines:
        raise DiffQError(f"--data '{data}' holds no text.")
    batches, told = _batches_of_texts(lines, data, model, folder)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and (largest := max(int(batch["input_ids"].max()) for batch in batches)) >= rows:
        raise DiffQError(
            f"the tokenizer of '{folder}' gives the token {largest} and the model has {rows}: it is another model's tokenizer."
        )
    return batches, told


@contextmanager
def _naming(data: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, TypeError, ValueError, SafetensorError) as error:  # numpy and torch have their own words for what a file may hold
        raise DiffQError(f"--data '{data}' cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _batches_of_tensors(tensors: dict[str, Tensor], data: Path, dtype: torch.dtype) -> tuple[list[dict[str, Tensor]], str]:
    lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len({*lengths.values()}) != 1 or (rows := next(iter(lengths.values()))) < _FEWEST:
        found = ", ".join(f"{name} {count}" for name, count in lengths.items()) or "no tensor"
        raise DiffQError(f"'{data}': every tensor needs as many rows as the others, {_FEWEST} or more; found {found}.")
    pieces = [_as_input(tensor, dtype).split(_rows(rows)) for tensor in tensors.values()]
    batches = [dict(zip(tensors, parts, strict=True)) for parts in zip(*pieces, strict=True)]
    return batches, f"{rows} rows of {', '.join(tensors)}"


def _as_input(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _rows(count: int) -> int:
    """Rows of a batch: of few rows many small batches are made, so that some can be held out."""
    return min(_ROWS, count // _FEWEST)


def _batches_of_texts(lines: Sequence[str], data: Path, model: PreTrainedModel, folder: Path) -> tuple[list[dict[str, Tensor]], str]:
    config, tokenizer = model.config, read_tokenizer(folder, "Put the tokenizer's files there, or give --data as .safetensors or .npy")
    if config.is_encoder_decoder:
        raise DiffQError(
            f"a {type(model).__name__} has an encoder and a decoder, and a text does not say what the decoder reads: "
            "give --data as .safetensors with input_ids and decoder_input_ids."
        )
    limit = min(getattr(config, "max_position_embeddings", None) or _WINDOW_TOKENS, tokenizer.model_max_length)
    if model.can_generate():
        length = min(_WINDOW_TOKENS, limit)
        ids = torch.tensor(tokenizer("\n".join(lines), verbose=False)["input_ids"])
        windows = ids[: len(ids) // length * length].reshape(-1, 1, length)
        if len(windows) < _FEWEST:
            raise DiffQError(f"--data '{data}' is too short: {len(ids)} tokens, and {_FEWEST * length} are the least.")
        return [
            {"input_ids": window} for window in windows[:_MOST_BATCHES]
        ], f"{min(len(windows), _MOST_BATCHES)} windows of {length} tokens"
    if len(lines) < _FEWEST:
        raise DiffQError(f"--data '{data}' is too short: {len(lines)} lines of text, and {_FEWEST} are the least.")
    if tokenizer.pad_token is None:  # the attention mask hides what it is
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    rows, taken = _rows(len(lines)), inspect.signature(model.forward).parameters
    lines = lines[: rows * _MOST_BATCHES]
    batches = [
        tokenizer(lines[start : start + rows], return_tensors="pt", padding=True, truncation=True, max_length=min(_TEXT_TOKENS, limit))
        for start in range(0, len(lines), rows)
    ]
    return [{name: tensor for name, tensor in batch.items() if name in taken} for batch in batches], f"{len(lines)} texts"


def read_tokenizer(folder: Path, how: str) -> Any:
    """The tokenizer of a folder; without one an error that says ``how`` to get on."""
    if not folder.is_dir():  # transformers would take it for a name of the hub
        raise DiffQError(f"'{folder}' has no tokenizer: there is no such folder. {how}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # what is missing decides the type
        _refuse_without_words(folder, ("tokenizer.model", "vocab.json", "vocab.txt"), how)
        said = " ".join(str(error).split())
        raise DiffQError(f"'{folder}' has no tokenizer that transformers can load. {how}. {type(error).__name__}: {said}") from error
    _refuse_without_words(folder, tuple(tokenizer.vocab_files_names.values()), how)  # transformers makes one without
    return tokenizer


def _refuse_without_words(folder: Path, files: Sequence[str], how: str) -> None:
    if files and not any((folder / name).is_file() for name in ("tokenizer.json", *files)):
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "no file"
        raise DiffQError(
            f"'{folder}' has no tokenizer: expected tokenizer.json, which tokenizer.save_pretrained writes, or {', '.join(files)}; "
            f"found {found}. {how}."
        )


def save_folder(model: Any, source: Path | None, target: Path) -> None:
    """``save_pretrained`` of a converted model, with what lies beside the weights in the folder that it came from: tokenizer, processor."""
    model.save_pretrained(target)
    for path in () if source is None else sorted(source.iterdir()):
        is_beside = path.is_file() and path.suffix in _BESIDE_WEIGHTS and not path.name.endswith(".index.json")
        if is_beside and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
