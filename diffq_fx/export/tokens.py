"""How many tokens a decoder of transformers knows: what its config, its tables and its tokenizer have to agree on."""

from typing import Any

from diffq_fx.errors import ExportError


def number_of_tokens(model: Any) -> int:
    """Tokens of a decoder.

    Raises:
        ExportError: its config says another number than the embedding or the head has.
    """
    size = model.config.get_text_config().vocab_size
    tables = {"embedding": (model.get_input_embeddings(), "num_embeddings"), "head": (model.get_output_embeddings(), "out_features")}
    for what, (table, attribute) in tables.items():
        if (rows := getattr(table, attribute, size)) != size:
            raise ExportError(f"the config has vocab_size={size} and the model's {what} {rows} tokens. Set config.vocab_size={rows}")
    return size


def refuse_more_tokens(tokens: int, size: int) -> None:
    """Refuse a tokenizer with more tokens than the model.

    Raises:
        ExportError: has both numbers.
    """
    if tokens > size:
        raise ExportError(f"the tokenizer has {tokens} tokens and the model's embedding {size}: it is another model's tokenizer")
