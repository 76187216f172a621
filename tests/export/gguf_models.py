"""Tiny decoders of each architecture that a GGUF file can hold, and tokenizers for them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from benchmarks._gguf import run_llama, why_no_llama
from diffq_fx import convert, prepare
from diffq_fx.methods import STE

WORDS, UNUSED = 400, 16
IDS = {"input_ids": torch.randint(WORDS, (2, 9), generator=torch.Generator().manual_seed(0))}
BODY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}  # transformers reads this length alone from a file
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": ("Llama", {**BODY, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**BODY, "head_dim": 32, "sliding_window": 128}),
    "qwen2": ("Qwen2", BODY),  # has biases of q, k and v
    "qwen3": ("Qwen3", {**BODY, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
    "gpt2": ("GPT2", GPT2),
    "llama-biased": ("Llama", {**BODY, "attention_bias": True}),
    "llama-linear": ("Llama", {**BODY, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": ("Llama", {**BODY, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}}),
}
READ_BACK = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Those that transformers makes again of a file: it reads neither the biases of a Llama nor its changed rotary frequencies."""
EXACT = STE(bits=4, group_size=32, grid="symmetric", scale_dtype="float16")


def decoder(name, **settings):
    """Weights that are large enough for tokens to differ, and norms that are not one."""
    kind, body = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{**body, "vocab_size": WORDS + UNUSED, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, **settings}
    )
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def rounded(model, method=EXACT):
    return convert(prepare(model, IDS, method))


TEXT = Path(__file__).parents[2].joinpath("README.md").read_text() + " 1234 5 67890 Größe don't I'LL \n\n\t x"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(expression):
    return [pre_tokenizers.Split(Regex(SPLIT % expression), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


PRE_TOKENIZERS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": split_by(""),
    "llama-bpe": split_by("{1,3}"),
    "smaug-bpe": split_by("{1,3}"),
}


METASPACES = {"sentencepiece": None, "metaspace": "first", "no-space": "never"}
"""Ways in which a tokenizer of SentencePiece's kind is described: by a normalizer, or by a pre-tokenizer."""


def tokenizer_of(kind, folder):
    """A tokenizer of 400 tokens in a folder: byte-level BPE of a kind, or SentencePiece's as Llama 2 has it."""
    bytes_alone = kind not in METASPACES
    end = "<|end|>" if bytes_alone else "</s>"
    if not bytes_alone:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if scheme := METASPACES[kind]:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", end, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
        steps = PRE_TOKENIZERS[kind]
        tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
        tokenizer.decoder, special = decoders.ByteLevel(), [end]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if bytes_alone else {"limit_alphabet": 80}
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    described = json.loads(tokenizer.to_str())
    if bytes_alone:
        del described["model"]["merges"][-60:]  # their tokens are made of no others: words that are one are found if merges are ignored
    described["added_tokens"] = [each for each in described["added_tokens"] if not each["content"].startswith("<0x")]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token=end, bos_token=end)
    fast.save_pretrained(folder)
    return fast


def llama_cpp(*args, **kwargs):
    """``run_llama``, where there is one."""
    if why := why_no_llama():
        pytest.skip(why)
    return run_llama(*args, **kwargs)
