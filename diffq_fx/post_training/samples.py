"""Text that a language model writes itself, to calibrate on where there is no other."""

from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.arguments import check_whole
from diffq_fx.example import in_eval, restored_random_state

_CALLER = "own_samples"


def own_samples(model: nn.Module, count: int = 32, tokens: int = 512, *, rows: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches for :func:`~diffq_fx.compress` without any text: a decoder's own, from a random first token on (LLM-QAT, arXiv:2305.17888).

    Differs from the paper: every token after the first is drawn from the model's probabilities; there the next few are the likeliest ones.

    Args:
        model: a causal language model of transformers, with ``generate``; left as it was.
        count: how many windows.
        tokens: length of a window, at least 2 and at most the model's context.
        rows: windows that are written side by side: as many as memory and speed like.
        seed: of all that is drawn.

    Returns:
        ``count`` batches of one window, ``{"input_ids": (1, tokens)}``, on the model's device.

    Raises:
        TypeError: the model generates nothing.
        ValueError: a number is out of its range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> batches = own_samples(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)), count=3, tokens=6)
        >>> len(batches), batches[0]["input_ids"].shape
        (3, torch.Size([1, 6]))
    """
    for name, value, least in (("count", count, 1), ("tokens", tokens, 2), ("rows", rows, 1)):
        check_whole(_CALLER, name, value, least)
    causal: Any = model
    if not callable(getattr(model, "generate", None)) or not callable(getattr(model, "get_input_embeddings", None)):
        raise TypeError(f"{_CALLER}: a causal language model of transformers is needed, got {type(model).__name__}: give text as batches.")
    check_whole(_CALLER, "tokens", tokens, 2, getattr(causal.config, "max_position_embeddings", None))  # None: without end, as BLOOM
    table = causal.get_input_embeddings().weight
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    length = {"min_new_tokens": tokens - 1, "max_new_tokens": tokens - 1, "pad_token_id": 0}  # no text ends early
    windows: list[Tensor] = []
    with restored_random_state(seed), in_eval(model), torch.no_grad():
        for first in torch.randint(len(table), (count, 1)).to(table.device).split(rows):
            windows += causal.generate(first, attention_mask=torch.ones_like(first), use_cache=True, **drawn, **length).split(1)
    return [{"input_ids": window} for window in windows]
