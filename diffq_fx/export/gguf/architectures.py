"""What a runtime of GGUF knows of a decoder: its sizes, the names of its tensors, the order of their rows, its rotary frequencies."""

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from diffq_fx.errors import ExportError


@dataclass(frozen=True)
class Architecture:
    """A decoder of transformers that runtimes of GGUF compute as transformers does."""

    known: gguf.MODEL_ARCH
    activation: str
    with_bias: frozenset[str] = frozenset()
    """Tensors that have a bias too, or may: llama.cpp refuses a file with any other."""
    pairs_neighbours: bool = False
    """Whether the runtime's rotary embedding turns channels 2i and 2i + 1 of a head, where transformers turns i and i + half."""

    @property
    def name(self) -> str:
        """What the file calls it."""
        return gguf.MODEL_ARCH_NAMES[self.known]


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_OF_GPT2 = frozenset({"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"})
_OF_LLAMA = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
ARCHITECTURES = {
    "gpt2": Architecture(gguf.MODEL_ARCH.GPT2, "gelu_new", _OF_GPT2),
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, "silu", _OF_LLAMA, pairs_neighbours=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, "silu", _OF_LLAMA, pairs_neighbours=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, "silu", _QKV),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, "silu"),
}
"""By the ``model_type`` of transformers' config."""

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_ROPE_SETTINGS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_NOT_SAID = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False}
"""Settings of GPT-2 for which a file has no words, and their usual values."""


def architecture_of(config: Any) -> Architecture:
    """The architecture of a config; an error if it has none that is known, or settings that a file cannot say."""
    if (model_type := getattr(config, "model_type", None)) is None:
        raise ExportError("the model is none of transformers: it has no config that names its architecture")
    if model_type not in ARCHITECTURES:
        raise ExportError(f"the architecture {model_type!r} is not known, only {', '.join(map(repr, ARCHITECTURES))} are")
    found = ARCHITECTURES[model_type]
    for name, usual in {"hidden_act": found.activation, "activation_function": found.activation, **_NOT_SAID}.items():
        if (value := getattr(config, name, usual)) != usual:
            raise ExportError(f"the config has {name}={value!r}, and a runtime of GGUF computes {found.name} with {usual!r}")
    if (rope := _rope_of(config)) and not {key for key, value in rope.items() if (key, value) != ("partial_rotary_factor", 1)} <= (
        _ROPE_SETTINGS.get(rope["rope_type"], set()) | {"rope_type"}
    ):
        raise ExportError(
            f"the config has rope_parameters={rope}; GGUF can say those of rope_type {', '.join(map(repr, _ROPE_SETTINGS))} alone"
        )
    return found


def _rope_of(config: Any) -> dict[str, Any]:
    return {key: value for key, value in (getattr(config, "rope_parameters", None) or {}).items() if value is not None}


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the sizes and constants of a model."""
    # runtimes look back without end: so far it is the same
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if not (rope := _rope_of(config)):  # GPT-2
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(_head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """By what a runtime divides the rotary frequencies of Llama 3, as a tensor of the file; None for other models."""
    if _rope_of(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = _head_size(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    changed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / changed).numpy()


def row_order(architecture: Architecture, name: str, config: Any, rows: int) -> NDArray[np.int64] | None:
    """In which order the rows of a tensor of the file stand in it; None where they stay as they are.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = SimpleNamespace(num_attention_heads=2, num_key_value_heads=1)
        >>> row_order(ARCHITECTURES["llama"], "blk.0.attn_q.weight", sizes, 8).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}.get(name.split(".")[-2])
    if heads is None or not architecture.pairs_neighbours:
        return None
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def file_names(architecture: Architecture, table: gguf.TensorNameMap, names: tuple[str, ...]) -> list[str]:
    """What a file calls a tensor that a model has under these names; a head that is tied to the embedding is no tensor of its own.

    Raises:
        ExportError: a name is not in the table, or the architecture has no such bias.
    """
    found = {name: table.get_name(name, (".weight", ".bias")) for name in names}
    for name, known in found.items():
        if known is None or (known.endswith(".bias") and known.split(".")[-2] not in architecture.with_bias):
            raise ExportError(
                f"tensor {name!r} has no place in the file: the architecture {architecture.name!r} of llama.cpp has no such tensor"
            )
    return [each for each in dict.fromkeys(map(str, found.values())) if each != HEAD or EMBEDDING not in found.values()]
