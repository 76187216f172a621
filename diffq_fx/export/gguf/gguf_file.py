"""export_gguf: a converted decoder of transformers in, one GGUF file out, whose blocks have the model's own levels."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffq_fx.arguments import as_path
from diffq_fx.atomic import draft_folder, naming, put_in_place, refuse_same_file
from diffq_fx.errors import ExportError, PackedFileError
from diffq_fx.example import in_eval
from diffq_fx.export.gguf.architectures import HEAD, Architecture, add_sizes, architecture_of, file_names, rope_factors, row_order
from diffq_fx.export.gguf.blocks import BLOCK, BlockedWeight
from diffq_fx.export.gguf.vocabulary import READ, Vocabulary, vocabulary_of
from diffq_fx.export.packed.writer import model_contents
from diffq_fx.export.tokens import number_of_tokens
from diffq_fx.parts import unwrapped
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.packing import in_smallest_type
from diffq_fx.weights import first_not_finite

_CHECKED = 16
"""Tokens that a model and what its config says are compared with."""
_ROUNDED, _ROUNDED_HALF = 1e-3, 5e-2
"""Relative differences of logits up to which they are the same."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a written file."""

    name: str
    """Its name in the file."""
    weight: str
    """Its name in the model's state_dict."""
    type: str
    """Its type of GGML: "Q4_0", "F32"."""
    numel: int
    file_bytes: int
    learned_bits: float | None
    """Bits of a level, the mean of all; None for what is not quantized. A type may have more."""


@dataclass(frozen=True)
class GGUFResult:
    """What :func:`export_gguf` has written."""

    path: Path
    tensors: tuple[GGUFTensor, ...]
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that a quantized weight takes in the file, with its share of scales and minimums."""
        quantized = [tensor for tensor in self.tensors if tensor.learned_bits is not None]
        return 8 * sum(tensor.file_bytes for tensor in quantized) / sum(tensor.numel for tensor in quantized)


class _Entry(NamedTuple):
    """A tensor to write; its bytes are made when it is its turn."""

    tensor: GGUFTensor
    shape: tuple[int, ...]
    order: NDArray[np.int64] | None
    data: Callable[[], NDArray[Any]]


def export_gguf(model: nn.Module, path: str | Path, *, tokenizer: str | Path | None, name: str | None = None) -> GGUFResult:
    """Write a converted decoder of transformers as a GGUF file, for llama.cpp and what is built on it.

    No weight is rounded again: each one becomes the smallest type of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 (4.5, 5, 5.5, 6 and 8.5 bits a weight)
    that holds its levels, scales and zero points exactly, and one that none of them holds is an error. So levels of 2 and 3 bits take 4.5
    bits. What is not quantized keeps its values. Known are Llama, Mistral, Qwen2, Qwen3 and GPT-2.

    Args:
        model: from ``convert``, of transformers and with a head; prepared with a scale in float16 for each block of 32 inputs.
        path: the file to write; its folder must exist.
        tokenizer: the Hugging Face folder with the tokenizer's files, above all tokenizer.json. None writes the weights alone:
            transformers can read such a file, a runtime gets tokens from it and no texts.
        name: what the file calls the model; None for its class.

    Returns:
        What was written, with the type and the size of each tensor.

    Raises:
        ExportError: the model is prepared or was never converted; its architecture is not known, or its config says what a file cannot
            or something else than the model computes; a weight fits no type; a tensor is not finite; the tokenizer is missing or of a kind
            that files cannot hold; the file cannot be written or is one that is read. There is no file then, or the old one.

    Example:
        >>> import os, tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from diffq_fx import convert, prepare
        >>> from diffq_fx.export.gguf import export_gguf
        >>> from diffq_fx.methods import STE
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
        >>> inputs = {"input_ids": torch.arange(8)[None]}
        >>> method = STE(bits=4, group_size=32, grid="symmetric", scale_dtype="float16")
        >>> converted = convert(prepare(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1)), inputs, method))
        >>> result = export_gguf(converted, os.path.join(tempfile.mkdtemp(), "tiny.gguf"), tokenizer=None)
        >>> result.tensors[0].type, result.bits_per_weight
        ('Q4_0', 4.5)
    """
    if not isinstance(tokenizer, str | Path | None):
        raise TypeError(f"export_gguf: tokenizer must be the folder that tokenizer.save_pretrained wrote, got {type(tokenizer).__name__}.")
    if not isinstance(name, str | None):
        raise TypeError(f"export_gguf: name must be a text or None, got {name!r}.")
    with _errors_of_export():
        return _export(unwrapped(model), as_path("export_gguf", "path", path), None if tokenizer is None else Path(tokenizer), name)


def refuse_unknown(model: nn.Module, tokenizer: str | Path | None) -> None:
    """The errors of :func:`export_gguf` for an architecture, tensor or tokenizer that it does not know, of a model that is float yet."""
    with _errors_of_export():
        whole: Any = unwrapped(model)
        architecture, _ = _known(whole, None if tokenizer is None else Path(tokenizer))
        table = gguf.get_tensor_name_map(architecture.known, whole.config.num_hidden_layers)
        for name in whole.state_dict():
            file_names(architecture, table, (name,))


@contextmanager
def _errors_of_export() -> Iterator[None]:
    try:
        yield
    except (ExportError, PackedFileError) as error:
        raise ExportError(f"export_gguf: {str(error).removesuffix('.')}.") from error


def _known(model: nn.Module, tokenizer: Path | None) -> tuple[Architecture, Vocabulary | None]:
    architecture = architecture_of(getattr(model, "config", None))
    size = number_of_tokens(model)
    return architecture, None if tokenizer is None else vocabulary_of(tokenizer, size)


def _export(model: nn.Module, path: Path, tokenizer: Path | None, name: str | None) -> GGUFResult:
    architecture, vocabulary = _known(model, tokenizer)
    config: Any = model.config
    entries = _entries(model, architecture, config)
    _check_config(model, config)
    if tokenizer is not None:
        refuse_same_file(path, [tokenizer / each for each in READ], ExportError)
    with (
        draft_folder(path, ExportError) as folder,
        naming(path, ExportError),
        closing(gguf.GGUFWriter(folder / "draft", architecture.name)) as writer,
    ):
        add_sizes(writer, config)
        writer.add_name(name or type(model).__name__)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(entries))
        if vocabulary is not None:
            vocabulary.add_to(writer)
        for tensor, shape, *_ in entries:
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.file_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for *_, order, data in entries:
            values = data()
            writer.write_tensor_data(np.ascontiguousarray(values if order is None else values[order]))
        writer.close()
        put_in_place(folder / "draft", path)
    return GGUFResult(path, tuple(entry.tensor for entry in entries), path.stat().st_size)


@torch.no_grad()
def _check_config(model: nn.Module, config: Any) -> None:
    """Compare a model with one that is made of its config alone, as runtimes make theirs: nothing else of its modules is in the file."""
    from transformers import AutoModelForCausalLM

    weights, rest = model_contents(model)
    values = {name: stored() for _, stored in weights for name in stored.spec.names} | {
        name: each for names, each in rest for name in names
    }
    example = next(iter(values.values()))
    with torch.random.fork_rng(devices=[]):  # first it has random weights
        made: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(example.device, example.dtype).eval()
    if lacking := made.load_state_dict(values, strict=False).missing_keys:
        raise ExportError(
            f"the config says that there is a tensor {lacking[0]!r}, and the model has none. Change the config with the model"
        )
    ids = torch.arange(_CHECKED, device=example.device)[None] * 37 % config.vocab_size
    with in_eval(model):
        ours, theirs = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, made))
    if not (off := float((ours - theirs).norm() / theirs.norm())) <= (_ROUNDED if example.dtype == torch.float32 else _ROUNDED_HALF):
        raise ExportError(
            f"a {type(made).__name__} of this config and these weights computes something else: its logits differ by {off:.2g} of "
            "their norm. A module was changed, and its config was not: runtimes know the config alone"
        )


def _file_type(entries: list[_Entry]) -> gguf.LlamaFileType:
    """What most of the quantized weights are."""
    counts = Counter()
    for tensor in (entry.tensor for entry in entries if entry.tensor.learned_bits is not None):
        counts[tensor.type] += tensor.numel
    return gguf.LlamaFileType[f"MOSTLY_{counts.most_common(1)[0][0]}"]


def _entries(model: nn.Module, architecture: Architecture, config: Any) -> list[_Entry]:
    """The tensors of the file; an error if one has no place or no type there."""
    weights, rest = model_contents(model)
    if where := first_not_finite((f"tensor {names[0]!r}", tensor) for names, tensor in rest):
        raise ExportError(where)
    from transformers.pytorch_utils import Conv1D

    table = gguf.get_tensor_name_map(architecture.known, config.num_hidden_layers)
    named = [(stored.spec.names, stored) for _, stored in weights] + [*rest]
    if HEAD not in [table.get_name(name, (".weight",)) for names, _ in named for name in names]:
        inside = ". Of adapters, merge_and_unload() before convert, and give its get_base_model()" * hasattr(model, "peft_config")
        raise ExportError(
            f"the {type(model).__name__} has no head that gives the next token; GGUF holds models like LlamaForCausalLM{inside}"
        )
    sideways = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}  # of shape (inputs, outputs)
    found = []
    for names, held in named:
        for name in file_names(architecture, table, names):
            if isinstance(held, StoredWeight):
                made = _quantized(held, name, names[0] in sideways)
            else:
                made = _plain(held.t() if names[0] in sideways else held, names[0], name)
            found.append(made._replace(order=row_order(architecture, name, config, made.shape[0])))
    if (factors := rope_factors(config)) is not None:
        found.append(_plain(torch.from_numpy(factors), "rotary frequencies", "rope_freqs.weight"))
    return found


def _quantized(stored: StoredWeight, name: str, is_sideways: bool) -> _Entry:
    spec = stored.spec
    if not isinstance(integers := stored.as_integers(), IntegerWeight):
        raise ExportError(f"weight {spec.name!r} is a {type(stored).__name__}, and GGUF holds integers with scales alone")
    if spec.axis != int(is_sideways) or len(spec.shape) != 2:
        raise ExportError(f"weight {spec.name!r} of shape {spec.shape} has its outputs along axis {spec.axis}; GGUF has no such matrix")
    blocked = BlockedWeight(integers)
    bits = stored.footprint().payload_bits / spec.numel
    size = spec.numel // BLOCK * blocked.type.block_bytes
    tensor = GGUFTensor(name, spec.name, blocked.type.name, spec.numel, size, bits)
    return _Entry(tensor, (spec.rows, spec.columns), None, blocked.data)


def _plain(values: Tensor, weight: str, name: str) -> _Entry:
    """A tensor that is not quantized: a vector in float32, as runtimes want it, a matrix in the smallest type that has its values."""
    values = values.detach().cpu()
    exact = values.float() if values.dim() < 2 or values.dtype == torch.float64 else in_smallest_type(values)
    if values.dtype == torch.float64 and not torch.equal(exact.double(), values):
        raise ExportError(f"tensor {weight!r} is of float64, which GGUF's runtimes do not read. Convert the model's float() form")
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[exact.dtype]
    tensor = GGUFTensor(name, weight, kind, exact.numel(), exact.nbytes, None)
    as_numpy = exact.view(torch.int16) if exact.dtype == torch.bfloat16 else exact
    return _Entry(tensor, tuple(exact.shape), None, as_numpy.numpy)
