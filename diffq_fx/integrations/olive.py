"""Folders of ``quant_method`` "olive": converted decoders as Olive and the model builder of onnxruntime-genai read them.

Of each matrix the folder has ``qweight`` (unsigned levels of 2, 4 or 8 bits, packed along the inputs), ``scales`` and ``qzeros``, one for
16 to 128 inputs each. Levels of other widths lie in the next wider container, and what more inputs share is repeated, so that nothing is
rounded again. Embeddings and norms are floats there; a weight that is embedding and head is written both ways.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from diffq_fx.arguments import as_path
from diffq_fx.atomic import naming, new_folder
from diffq_fx.errors import DiffQError, DiffQWarning, ExportError, missing
from diffq_fx.export.packed.writer import model_contents
from diffq_fx.export.tokens import number_of_tokens, refuse_more_tokens
from diffq_fx.integrations.olive_weight import HeldWeight, olive_weight
from diffq_fx.storage import StoredWeight

try:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from diffq_fx.integrations.hf_folders import say_nothing
    from diffq_fx.integrations.hf_sources import read_tokenizer
except ImportError as error:
    raise missing("transformers", error) from error

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head"
_LAYERS = re.compile(r"model\.layers\.\d+\.(self_attn\.([qkvo]|qkv)|mlp\.(gate|up|down|gate_up))_proj\.weight")
_OTHERS = re.compile(
    r"model\.(norm\.(weight|bias)|embed_tokens\.weight|layers\.\d+\.(\w+\.\w+_proj\.bias|self_attn\.sinks|"
    r"(self_attn\.([qk]_norm|(query|key)_layernorm)|(input|post_attention|(pre|post)_feedforward)_layernorm)\.(weight|bias)))|"
    r"lm_head\.(weight|bias)"
)
"""What the builder knows the names of."""
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_MUCH_LARGER = 1.1


@dataclass(frozen=True)
class OliveFolder:
    """What :func:`save_olive` wrote."""

    path: Path
    held: dict[str, HeldWeight]
    """By module; a fused one is in parts."""
    in_float: tuple[str, ...]
    """Quantized weights that the format has no integers for: their exact values are floats."""
    builder_options: dict[str, str]
    """For the builder's ``--extra_options``: without them it would round what is in float, or write an embedding that cannot be read."""


def save_olive(model: nn.Module, folder: str | Path, tokenizer: Any) -> OliveFolder:
    """Write a converted decoder as a folder that Olive and the model builder of onnxruntime-genai read, with the exact levels.

    ``python -m onnxruntime_genai.models.builder -i FOLDER -o OUT -p int4 -e cpu`` makes a model for onnxruntime-genai of it.
    :func:`~diffq_fx.integrations.genai.export_genai` does both steps, keeps a tied embedding small, and checks the builder.

    Args:
        model: from ``convert``: a decoder of transformers in whose layers every matrix is quantized, to at most 8 bits.
        folder: to make; there is none of this name yet, or it is empty.
        tokenizer: the model's, of transformers, or a Hugging Face folder with it: the builder asks for one.

    Returns:
        How each weight is held, and what the builder must be told.

    Raises:
        ExportError: the model is not converted or no such decoder, a weight has no exact form there, or the folder cannot be written.
        TypeError: neither a tokenizer nor a folder.

    Example: docs/how-to/onnxruntime-genai.md.
    """
    target = as_path("save_olive", "folder", folder)
    with new_folder(target, ExportError) as draft, naming(folder, ExportError):
        return replace(write_olive(model, draft, tokenizer, "save_olive"), path=target)


def write_olive(model: nn.Module, folder: Path, tokenizer: Any, caller: str) -> OliveFolder:
    """:func:`save_olive` into a folder that is there, with errors in the name of a caller."""
    tokenizer, decoder = tokenizer_for(model, tokenizer, caller), cast(PreTrainedModel, model)
    try:
        weights, rest = model_contents(model)
        check_names((name for _, stored in weights for name in stored.spec.names), type(model).__name__)
        check_names((names[0] for names, _ in rest), type(model).__name__, are_floats=True)
        held, tensors, in_float = _matrices([stored for _, stored in weights], decoder.config, caller)
    except DiffQError as error:
        raise ExportError(f"{caller}: {str(error).removesuffix('.')}.") from error
    tensors |= {names[0]: tensor for names, tensor in rest}
    described = copy.deepcopy(decoder.config)
    say_nothing(described)
    config = json.loads(described.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    if config.get("sliding_window") and not config.get("layer_types"):  # Mistral's every layer has it; the builder would take none
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    config["quantization_config"] = _quantization_config(held)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if decoder.generation_config is not None:
        decoder.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return OliveFolder(folder, held, in_float, _builder_options(held, decoder.config.tie_word_embeddings))


def tokenizer_for(model: nn.Module, tokenizer: Any, caller: str) -> Any:
    """The tokenizer, read if it is given by its folder; errors of :func:`save_olive` for another model or none."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise ExportError(
            f"{caller}: a {type(model).__name__} is no decoder of transformers that generates with a cache. "
            "Give the whole converted ...ForCausalLM."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase | str | Path):
        raise TypeError(
            f"{caller}: tokenizer must be the model's tokenizer of transformers, or a folder with one, got {type(tokenizer).__name__}: "
            "the runtime's folder holds it. The folder that the model came from has one."
        )
    try:
        if isinstance(tokenizer, str | Path):
            tokenizer = read_tokenizer(Path(tokenizer), "Put its files there, or give the tokenizer itself")
        refuse_more_tokens(1 + max(tokenizer.get_vocab().values(), default=-1), number_of_tokens(model))
    except DiffQError as error:
        raise ExportError(f"{caller}: {str(error).removesuffix('.')}.") from error
    return tokenizer


def _matrices(weights: list[StoredWeight], config: Any, caller: str) -> tuple[dict[str, HeldWeight], dict[str, Tensor], tuple[str, ...]]:
    """How each matrix is held, the tensors that it is in the folder, and the weights that are floats there."""
    held: dict[str, HeldWeight] = {}
    tensors: dict[str, Tensor] = {}
    in_float: list[str] = []
    learned = here = 0
    for stored in weights:
        if EMBEDDING in stored.spec.names:
            tensors[EMBEDDING] = copy.deepcopy(stored).float()()  # half precision would round the product of level and scale
        if set(stored.spec.names) == {EMBEDDING}:
            in_float.append(EMBEDDING)
            continue
        weight = olive_weight(stored)
        learned, here = learned + stored.footprint().payload_bits, here + weight.levels.numel() * weight.held.container_bits
        for module, rows in _modules_of(stored, config):
            held[module] = weight.held
            tensors |= {f"{module}.{name}": tensor for name, tensor in weight.tensors(rows).items()}
    if here > _MUCH_LARGER * learned:
        warnings.warn(
            f"{caller}: the levels take {here / 8 / 2**20:.2f} MiB in containers of 2, 4 or 8 bits, {learned / 8 / 2**20:.2f} MiB as "
            'learned. DiffQConfig.for_runtime("onnxruntime-genai") learns widths that take no more than they must.',
            DiffQWarning,
            stacklevel=4,
        )
    return held, tensors, tuple(in_float)


def check_names(names: Iterable[str], architecture: str, *, are_floats: bool = False) -> None:
    """Refuse tensors that the builder has no name for, and matrices of its layers that are floats."""
    for name in names:
        in_layers = _LAYERS.fullmatch(name)
        if not in_layers and not _OTHERS.fullmatch(name):
            raise ExportError(
                f"the builder of onnxruntime-genai does not know {name!r} of a {architecture} in quantized folders: it reads "
                "architectures with the names of Llama, Mistral, Qwen2, Qwen3, Phi-3 or Gemma."
            )
        if in_layers and are_floats:
            raise ExportError(
                f"{name!r} is a float, and the format has quantized matrices alone in its layers. Prepare it too; 8 bits are nearly exact."
            )


def _modules_of(stored: StoredWeight, config: Any) -> Iterator[tuple[str, slice]]:
    """The modules of the folder that a weight belongs to, each with its outputs: a fused projection is several."""
    name = next(name for name in stored.spec.names if name != EMBEDDING).removesuffix(".weight")
    path, _, fused = name.rpartition(".")
    rows = [stored.spec.rows]
    if fused == "gate_up_proj":
        rows = [stored.spec.rows // 2] * 2
    elif fused == "qkv_proj":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows = [size * heads for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    start = 0
    for part, count in zip(_PARTS.get(fused, (fused,)), rows, strict=True):
        yield f"{path}.{part}".lstrip("."), slice(start, start + count)
        start += count


def _quantization_config(held: dict[str, HeldWeight]) -> dict[str, Any]:
    settings = {name: {"bits": each.container_bits, "group_size": each.group_size} for name, each in held.items()}
    usual = max(settings.values(), key=list(settings.values()).count)
    others = {name: setting for name, setting in settings.items() if setting != usual}
    left = [] if HEAD in held else [HEAD]
    return {"quant_method": "olive", **usual, "symmetric": False, "overrides": others, "modules_to_not_convert": left}


def _builder_options(held: dict[str, HeldWeight], is_tied: bool) -> dict[str, str]:
    if HEAD not in held:
        return {"nodes_to_exclude": "/lm_head/MatMul,/model/embed_tokens/Gather"}
    return {"shared_embeddings": "false"} if is_tied else {}
