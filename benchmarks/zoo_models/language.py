"""Language models of transformers and x_transformers, of 32 channels and two layers, with random weights: nothing is downloaded."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_models.entry import Architecture, tokens

VOCABULARY, LENGTH = 67, 12
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def hf_model(architecture: str, config: str, **settings: Any) -> nn.Module:
    """A model of transformers; without the cache, which no exporter takes."""
    import transformers

    made = getattr(transformers, config)(**settings)
    for part in (made, made.get_text_config()):
        part.use_cache = False
    return getattr(transformers, architecture)(made)


def tiny(architecture: str, config: str, family: str, inputs: Callable[[int], Any], **settings: Any) -> Architecture:
    """An architecture of transformers in its smallest form; settings of None are left out."""
    settings = {name: value for name, value in {**BODY, **settings}.items() if value is not None}

    def named(batch: int) -> Any:
        given = inputs(batch)
        return given if isinstance(given, dict) else {"pixel_values": given}

    return Architecture(architecture, "transformers", family, functools.partial(hf_model, architecture, config, **settings), named)


def ids(batch: int) -> dict[str, Any]:
    """Token numbers."""
    return {"input_ids": tokens(VOCABULARY, batch, LENGTH)}


def masked(batch: int) -> dict[str, Any]:
    """Token numbers and a mask that hides two of them."""
    mask = torch.ones(batch, LENGTH, dtype=torch.int64)
    mask[0, -2:] = 0
    return {**ids(batch), "attention_mask": mask}


def pairs(batch: int) -> dict[str, Any]:
    """Texts for the encoder and for the decoder."""
    return {**ids(batch), "decoder_input_ids": tokens(VOCABULARY, batch, 7)}


def masked_pairs(batch: int) -> dict[str, Any]:
    """The same with the masks that some models make for themselves, but not while torch.export traces them."""
    return {**pairs(batch), **masked(batch), "decoder_attention_mask": torch.ones(batch, 7, dtype=torch.int64)}


def _encoder(name: str, head: str = "ForSequenceClassification", **settings: Any) -> Architecture:
    return tiny(f"{name}{head}", f"{name}Config", "encoder", masked, **{**TEXT, **settings})


def _decoder(name: str, family: str = "decoder", head: str = "ForCausalLM", **settings: Any) -> Architecture:
    return tiny(f"{name}{head}", f"{name}Config", family, ids, **{**_DECODER, **settings})


def _seq2seq(name: str, inputs: Callable[[int], Any] = pairs, **settings: Any) -> Architecture:
    other = {**TEXT, **SEQ2SEQ, "decoder_start_token_id": 2, **dict.fromkeys(BODY), **settings}
    return tiny(f"{name}ForConditionalGeneration", f"{name}Config", "encoder-decoder", inputs, **other)


def _t5(name: str, **settings: Any) -> Architecture:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return _seq2seq(
        name,
        **{
            **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")),
            **sizes,
            **settings,
        },
    )


def _x(name: str, build: Callable[[Any], nn.Module]) -> Architecture:
    def make() -> nn.Module:
        import x_transformers

        return build(x_transformers)

    return Architecture(name, "x_transformers", "decoder", make, lambda batch: tokens(VOCABULARY, batch, LENGTH))


def _wrapped(x: Any, **settings: Any) -> nn.Module:
    return x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=64, attn_layers=x.Decoder(dim=32, depth=2, heads=2, **settings))


_ENCODERS = [
    _encoder("Bert"),
    _encoder("Roberta"),
    _encoder("Albert", embedding_size=16),
    _encoder("Electra", embedding_size=16),
    _encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    _encoder("MPNet"),
    _encoder("MobileBert", embedding_size=16, true_hidden_size=32, intra_bottleneck_size=32),
    _encoder("SqueezeBert", embedding_size=32),
    _encoder("ConvBert", embedding_size=16, head_ratio=1, conv_kernel_size=3),
    _encoder("ModernBert", cls_token_id=1, sep_token_id=2),
    _encoder("RoFormer", embedding_size=16),
    _encoder("Nystromformer", segment_means_seq_len=12, num_landmarks=12),
    _encoder("BigBird", attention_type="original_full"),
    _encoder("Longformer", attention_window=4),
    _encoder("XLNet", d_model=32, n_layer=2, n_head=2, d_inner=64, max_position_embeddings=None, **dict.fromkeys(BODY)),
    tiny("FNetForSequenceClassification", "FNetConfig", "encoder", ids, **TEXT),
    _encoder("Funnel", d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[1, 1], num_decoder_layers=1, **dict.fromkeys(BODY)),
    _encoder("Esm", "ForMaskedLM", mask_token_id=3, position_embedding_type="rotary", token_dropout=False),
]
_DECODERS = [
    _decoder("GPT2", head="LMHeadModel", n_embd=32, n_layer=2, n_head=2, **dict.fromkeys(BODY), head_dim=None, num_key_value_heads=None),
    _decoder("Llama"),
    _decoder("Mistral", sliding_window=8),
    _decoder("Qwen3"),
    _decoder("Gemma2"),
    _decoder("Phi3"),
    _decoder("GPTNeoX", head_dim=None, num_key_value_heads=None),
    _decoder("GPTJ", n_embd=32, n_layer=2, n_head=2, rotary_dim=8, **dict.fromkeys(BODY), head_dim=None, num_key_value_heads=None),
    _decoder("Opt".upper(), ffn_dim=64, word_embed_proj_dim=32, intermediate_size=None, head_dim=None, num_key_value_heads=None),
    _decoder("Bloom", n_layer=2, n_head=2, **(dict.fromkeys(BODY) | {"hidden_size": 32}), head_dim=None, num_key_value_heads=None),
    _decoder("Falcon", head_dim=None, num_kv_heads=1, num_key_value_heads=None),
    _decoder("StableLm"),
    _decoder("Olmo2"),
    _decoder("Granite"),
    _decoder("Cohere"),
    _decoder("Starcoder2"),
    _decoder("SmolLM3"),
    _decoder("CodeGen", n_embd=32, n_layer=2, n_head=4, rotary_dim=8, **dict.fromkeys(BODY), head_dim=None, num_key_value_heads=None),
    _x("alibi decoder", lambda x: _wrapped(x, alibi_pos_bias=True, alibi_num_heads=2)),
    _x("rotary decoder with gated feed-forward", lambda x: _wrapped(x, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True)),
    _x("decoder with T5's bias", lambda x: _wrapped(x, rel_pos_bias=True)),
]
_EXPERTS = [
    _decoder("Mixtral", "mixture of experts", **_MOE),
    _decoder("Qwen3Moe", "mixture of experts", **_MOE, decoder_sparse_step=1),
    _decoder("Olmoe", "mixture of experts", **_MOE),
    _decoder("GraniteMoe", "mixture of experts", **_MOE),
    _decoder("PhiMoE".replace("MoE", "moe"), "mixture of experts", **_MOE),
    tiny(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        "mixture of experts",
        masked_pairs,
        **TEXT,
        **dict.fromkeys(BODY),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        num_decoder_layers=2,
        num_experts=4,
        decoder_start_token_id=0,
        router_jitter_noise=0.0,
    ),
]
_STATE_SPACES = [
    _decoder("Mamba", "state space and recurrent", state_size=8, time_step_rank=4, head_dim=None, num_key_value_heads=None),
    _decoder(
        "Mamba2", "state space and recurrent", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=4, num_key_value_heads=None
    ),
    _decoder("FalconMamba", "state space and recurrent", state_size=8, time_step_rank=4, head_dim=None, num_key_value_heads=None),
    _decoder("Rwkv", "state space and recurrent", attention_hidden_size=32, head_dim=None, num_key_value_heads=None),
    _decoder("RecurrentGemma", "state space and recurrent", lru_width=32, attention_window_size=8, num_hidden_layers=3, head_dim=None),
    _decoder("Lfm2", "state space and recurrent", layer_types=["conv", "full_attention"], head_dim=None),
    _decoder(
        "Bamba",
        "state space and recurrent",
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=4,
        head_dim=None,
    ),
]
_ENCODER_DECODERS = [
    _seq2seq("Bart"),
    _seq2seq("Pegasus"),
    _seq2seq("M2M100"),
    _seq2seq("Blenderbot"),
    _seq2seq("LED", attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    _t5("T5"),
    _t5("MT5"),
    _t5("LongT5", inputs=masked_pairs, local_radius=4),
    tiny(
        "MarianMTModel",
        "MarianConfig",
        "encoder-decoder",
        pairs,
        **TEXT,
        **dict.fromkeys(BODY),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=0,
    ),
    tiny(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        "encoder-decoder",
        pairs,
        **TEXT,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=0,
        num_hidden_layers=None,
        num_attention_heads=None,
        intermediate_size=None,
    ),
]


def _adapted(build: Callable[[], nn.Module], **settings: Any) -> nn.Module:
    import peft

    return peft.get_peft_model(build(), peft.LoraConfig(r=4, init_lora_weights=False, **settings)).requires_grad_(True)


def _lora(base: Architecture, name: str, **settings: Any) -> Architecture:
    return Architecture(name, "peft", "LoRA", functools.partial(_adapted, base.build, **settings), base.inputs)


_BY_NAME = {each.name: each for each in (*_ENCODERS, *_DECODERS, *_ENCODER_DECODERS)}
_LORA = [
    _lora(_BY_NAME["BertForSequenceClassification"], "LoRA of BERT", target_modules=["query", "value"]),
    _lora(_BY_NAME["LlamaForCausalLM"], "LoRA of Llama", target_modules="all-linear"),
    _lora(_BY_NAME["GPT2LMHeadModel"], "LoRA of GPT-2 (Conv1D)", target_modules=["c_attn"], fan_in_fan_out=True),
    _lora(_BY_NAME["T5ForConditionalGeneration"], "LoRA of T5", target_modules=["q", "v"]),
    _lora(_BY_NAME["Qwen3ForCausalLM"], "DoRA of Qwen3", target_modules=["q_proj", "v_proj"], use_dora=True),
]

ARCHITECTURES = [*_ENCODERS, *_DECODERS, *_EXPERTS, *_STATE_SPACES, *_ENCODER_DECODERS, *_LORA]
