"""Hugging Face models from tiny configurations with random weights: nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from zoo.entry import Entry, randn, tokens

_VOCABULARY = 67


def _make(architecture: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Build a model of an architecture; without the cache, which no exporter takes."""

    def build() -> nn.Module:
        made = getattr(transformers, config)(**settings)
        made.use_cache = False
        return getattr(transformers, architecture)(made)

    return build


def _ids(variant: int) -> dict[str, Any]:
    return {"input_ids": tokens(_VOCABULARY, 2 + variant, 7 + variant)}


def _masked(variant: int) -> dict[str, Any]:
    ids = tokens(_VOCABULARY, 2 + variant, 7 + variant)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _encoder_decoder(variant: int) -> dict[str, Any]:
    return {**_ids(variant), "decoder_input_ids": tokens(_VOCABULARY, 2 + variant, 5 + variant)}


_BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_DECODER = {**_BODY, "vocab_size": _VOCABULARY, "num_key_value_heads": 1, "max_position_embeddings": 32}
_IMAGE = {**_BODY, "image_size": 16, "patch_size": 8, "num_labels": 3}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _images(variant: int) -> dict[str, Any]:
    return {"pixel_values": randn(2 + variant, 3, 16, 16)}


def _hf(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Any], weights: int, **flags: Any) -> Entry:
    return Entry(name=name, build=build, inputs=inputs, weights=weights, untraceable="which the example leaves out", slow=True, **flags)


ENTRIES = [
    _hf(
        "bert",
        _make("BertForSequenceClassification", "BertConfig", **_BODY, vocab_size=_VOCABULARY, max_position_embeddings=32, num_labels=3),
        _masked,
        17,
    ),
    _hf(
        "gpt2",
        _make("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=_VOCABULARY, n_positions=32, **_ENDS),
        _ids,
        10,
    ),
    _hf("llama", _make("LlamaForCausalLM", "LlamaConfig", **_DECODER, **_ENDS), _ids, 16),
    _hf("qwen2", _make("Qwen2ForCausalLM", "Qwen2Config", **_DECODER, **_ENDS, tie_word_embeddings=True), _ids, 15),
    _hf(
        "qwen3_moe",
        _make(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **_DECODER,
            **_ENDS,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            decoder_sparse_step=1,
        ),
        _ids,
        16,
    ),
    _hf(
        "modernbert",
        _make(
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            **_BODY,
            **_ENDS,
            cls_token_id=1,
            sep_token_id=2,
            vocab_size=_VOCABULARY,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        ),
        _masked,
        10,
    ),
    _hf("vit", _make("ViTForImageClassification", "ViTConfig", **_IMAGE), _images, 15, skipped=("vit.embeddings.cls_token",)),
    _hf(
        "deit",
        _make("DeiTForImageClassification", "DeiTConfig", **_IMAGE),
        _images,
        15,
        skipped=("deit.embeddings.cls_token", "deit.embeddings.distillation_token"),
    ),
    _hf(
        "wav2vec2",
        _make(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **_BODY,
            vocab_size=_VOCABULARY,
            conv_dim=(8, 8),
            conv_stride=(4, 4),
            conv_kernel=(8, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
        ),
        lambda v: {"input_values": randn(2 + v, 400 + 64 * v)},
        17,
        skipped=("wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0",),
        pickles=False,
    ),
    _hf(
        "t5",
        _make(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=_VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            tie_word_embeddings=True,
            **_ENDS,
        ),
        _encoder_decoder,
        35,
    ),
    _hf(
        "whisper",
        _make(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=_VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=20,
            max_target_positions=16,
            num_mel_bins=6,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
            **_ENDS,
        ),
        lambda v: {"input_features": randn(2 + v, 6, 40), "decoder_input_ids": tokens(_VOCABULARY, 2 + v, 5 + v)},
        37,
        frozen=("model.encoder.embed_positions.weight",),
    ),
]
