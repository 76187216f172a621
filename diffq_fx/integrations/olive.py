"""Folders of ``quant_method`` "olive": converted decoders as Olive and the model builder of onnxruntime-genai read them.

Of each matrix the folder has ``qweight`` (unsigned levels of 2, 4 or 8 bits, packed along the inputs), ``scales`` and ``qzeros``, one for
16 to 128 inputs each. Levels of other widths lie in the next wider container, and what more inputs share is repeated, so that nothing is
rounded again. Embeddings and norms are floats there; a weight that is embedding and head is written both ways.
"""

import copy
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffq_fx.atomic import new_folder
from diffq_fx.errors import DiffQWarning, ExportError, PackedFileError
from diffq_fx.export.onnx.layout.table import read_table
from diffq_fx.export.packed.writer import contents_of
from diffq_fx.integrations import missing
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.storage.packing import pack_levels

try:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from diffq_fx.integrations.hf_folders import say_nothing
except ImportError as error:
    raise missing("transformers", error) from error

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_LAYERS = re.compile(r"model\.layers\.\d+\.(self_attn\.([qkvo]|qkv)|mlp\.(gate|up|down|gate_up))_proj\.weight")
_OTHERS = re.compile(
    r"model\.(norm\.(weight|bias)|embed_tokens\.weight|layers\.\d+\.(\w+\.\w+_proj\.bias|self_attn\.sinks|"
    r"(self_attn\.([qk]_norm|(query|key)_layernorm)|(input|post_attention|(pre|post)_feedforward)_layernorm)\.(weight|bias)))|"
    r"lm_head\.(weight|bias)"
)
"""What the builder knows the names of."""
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FEWEST, _MOST = 16, 128
"""Inputs that share a scale."""
_WIDEST, _SCALE_BITS = 8, 32
_MUCH_LARGER = 1.1


@dataclass(frozen=True)
class OliveWeight:
    """One matrix as the format has it. Shape legend: O outputs, I inputs, G groups of inputs."""

    levels: Tensor
    """int32, shape (O, I), unsigned."""
    scale: Tensor
    """float32, shape (O, G)."""
    zero_point: Tensor
    """int32, shape (O, G)."""
    container_bits: int
    """2, 4 or 8."""
    bits: int
    """Of the widest group, as learned."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.levels.shape[1] // self.scale.shape[1]

    @property
    def size(self) -> int:
        """Bits of levels, scales and zero points."""
        return self.levels.numel() * self.container_bits + self.scale.numel() * (_SCALE_BITS + self.container_bits)

    def tensors(self, rows: slice) -> dict[str, Tensor]:
        """What the folder has of some of the outputs."""
        scale, zero_point = self.scale[rows], self.zero_point[rows]
        missing = -zero_point.shape[1] % (8 // self.container_bits)
        padded = nn.functional.pad(zero_point, (0, missing))  # a row begins at a byte
        packed = (pack_levels(each, self.container_bits).reshape(len(scale), -1) for each in (self.levels[rows], padded))
        return dict(zip(("qweight", "qzeros"), packed, strict=True)) | {"scales": scale.contiguous()}


@dataclass(frozen=True)
class OliveFolder:
    """What :func:`save_olive` wrote."""

    path: Path
    held: dict[str, tuple[int, int, int]]
    """Module -> bits of its widest group as learned, bits of its container, inputs that share a scale. Fused modules are in parts."""
    in_float: tuple[str, ...]
    """Quantized weights that the format has no integers for: their exact values are floats."""
    builder_options: dict[str, str]
    """What the builder's ``--extra_options`` must say, or it would round what is in float."""


def save_olive(model: nn.Module, folder: str | Path, tokenizer: Any) -> OliveFolder:
    """Write a converted decoder as a folder that Olive and the model builder of onnxruntime-genai read, with the exact levels.

    ``python -m onnxruntime_genai.models.builder -i FOLDER -o OUT -p int4 -e cpu`` makes a model for onnxruntime-genai of it.
    :func:`~diffq_fx.integrations.genai.export_genai` does both steps, keeps a tied embedding small, and checks the builder.

    Args:
        model: from ``convert``: a decoder of transformers in whose layers every matrix is quantized, to at most 8 bits.
        folder: to make; there is none of this name yet, or it is empty.
        tokenizer: the model's, of transformers: the builder asks for one.

    Returns:
        How each weight is held, and what the builder must be told.

    Raises:
        ExportError: the model is not converted or no such decoder, a weight has no exact form there, or the folder cannot be written.
        TypeError: something else than a tokenizer.

    Example: see :func:`~diffq_fx.integrations.genai.export_genai`.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise ExportError(
            f"save_olive: a {type(model).__name__} is no decoder of transformers that generates with a cache. "
            "Give the whole converted ...ForCausalLM."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"save_olive: tokenizer must be the model's tokenizer of transformers, got {type(tokenizer).__name__}: "
            "the runtime's folder holds one. AutoTokenizer.from_pretrained(the folder that the model came from) gives it."
        )
    try:
        weights, rest = contents_of(model)
        _check_names([stored for _, stored in weights], [names[0] for names, _ in rest], type(model).__name__)
        held = {stored: olive_weight(stored) for _, stored in weights if any(name != f"{EMBEDDING}.weight" for name in stored.spec.names)}
    except (ExportError, PackedFileError) as error:
        raise ExportError(f"save_olive: {error}") from error
    tensors = {names[0]: tensor for names, tensor in rest}
    modules: dict[str, OliveWeight] = {}
    for stored, weight in held.items():
        for module, rows in _modules_of(stored, model.config):
            modules[module] = weight
            tensors |= {f"{module}.{name}": tensor for name, tensor in weight.tensors(rows).items()}
    embeddings = [stored for _, stored in weights if f"{EMBEDDING}.weight" in stored.spec.names]
    tensors |= {f"{EMBEDDING}.weight": stored() for stored in embeddings}
    _warn_if_larger(held)
    with new_folder(Path(folder), ExportError) as draft:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft / "model.safetensors")
        described = copy.deepcopy(model.config)
        say_nothing(described)
        config = json.loads(described.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
        config["quantization_config"] = _quantization_config(modules)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return OliveFolder(
        Path(folder),
        {name: (weight.bits, weight.container_bits, weight.group_size) for name, weight in modules.items()},
        tuple(stored.spec.name for stored in embeddings if stored not in held),
        {} if HEAD in modules else {"nodes_to_exclude": "/lm_head/MatMul,/model/embed_tokens/Gather"},
    )


def _check_names(weights: list[StoredWeight], rest: list[str], architecture: str) -> None:
    names = [name for stored in weights for name in stored.spec.names]
    for name in (*names, *rest):
        if not _LAYERS.fullmatch(name) and not _OTHERS.fullmatch(name):
            raise ExportError(
                f"the builder of onnxruntime-genai does not know {name!r} of a {architecture} in quantized folders: it reads "
                "architectures with the names of Llama, Mistral, Qwen2, Qwen3, Phi-3 or Gemma."
            )
    if floats := [name for name in rest if _LAYERS.fullmatch(name)]:
        raise ExportError(
            f"{floats[0]!r} is a float ({len(floats)} in all), and the format has quantized matrices alone in its layers. "
            "Prepare them too, with 8 bits where it matters."
        )


def olive_weight(stored: StoredWeight) -> OliveWeight:
    """A stored weight in this format, computing the same; an error if it has none."""
    name = stored.spec.name
    integers = stored.as_integers() if isinstance(stored, CodebookWeight) else stored
    if not isinstance(integers, IntegerWeight):
        raise ExportError(f"weight {name!r} has a codebook that is not integers times one scale; the format has those alone.")
    spec, table, layout = integers.spec, read_table(integers), integers.spec.scale_layout
    if len(spec.shape) != 2:
        raise ExportError(f"weight {name!r} has the shape {spec.shape}; the format has matrices alone.")
    if (container := table.kernel_bits) > _WIDEST:
        raise ExportError(f"weight {name!r}: {table.widest}; the format has up to {_WIDEST} bits. Prepare with max_bits={_WIDEST}.")
    if (group := math.gcd(layout.block, layout.columns, _MOST)) < _FEWEST:
        raise ExportError(
            f"weight {name!r} has {layout.columns} inputs and a scale for {layout.block} of them; the format has scales for {_FEWEST}, 32, "
            f"64 or {_MOST}, which must divide both."
        )
    half = 2 ** (container - 1)
    scale, levels = torch.from_numpy(table.scale), torch.from_numpy(table.levels)
    zero_point = torch.full_like(scale, half, dtype=torch.int32) if table.zero_point is None else torch.from_numpy(table.zero_point)
    scale_OG, zero_point_OG = (layout.expand(each).expand(spec.rows, spec.columns)[:, ::group] for each in (scale, zero_point))
    return OliveWeight(levels + half if table.signed else levels, scale_OG, zero_point_OG, container, table.most_bits)


def _modules_of(stored: StoredWeight, config: Any) -> Iterator[tuple[str, slice]]:
    """The modules of the folder that a weight belongs to, each with its outputs: a fused projection is several."""
    name = next(name for name in stored.spec.names if name != f"{EMBEDDING}.weight").removesuffix(".weight")
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


def _quantization_config(modules: dict[str, OliveWeight]) -> dict[str, Any]:
    settings = {name: (weight.container_bits, weight.group_size) for name, weight in modules.items()}
    (usual, _), *_ = Counter(settings.values()).most_common(1)
    described = {"bits": usual[0], "group_size": usual[1]}
    others = {name: {"bits": bits, "group_size": size} for name, (bits, size) in settings.items() if (bits, size) != usual}
    left = [] if HEAD in modules else [HEAD]
    return {"quant_method": "olive", **described, "symmetric": False, "overrides": others, "modules_to_not_convert": left}


def _warn_if_larger(held: dict[StoredWeight, OliveWeight]) -> None:
    learned, here = (
        sum(bits) / 8 / 2**20 for bits in ([each.footprint().packed_bits for each in held], [each.size for each in held.values()])
    )
    if here > _MUCH_LARGER * learned:
        warnings.warn(
            f"save_olive: the matrices take {here:.2f} MiB in containers of 2, 4 or 8 bits, {learned:.2f} MiB as learned. "
            "Widths of 2, 4 and 8 bits, one for each matrix, take no more than they must.",
            DiffQWarning,
            stacklevel=3,
        )
