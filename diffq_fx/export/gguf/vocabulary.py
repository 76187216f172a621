"""The tokenizer of a Hugging Face folder as metadata of a GGUF file, so that a runtime cuts texts as transformers does.

What is read is ``tokenizer.json``: byte-level BPE, or the BPE with bytes as a fallback that Llama 2 and Mistral have (SentencePiece's).
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from diffq_fx.errors import ExportError
from diffq_fx.export.tokens import refuse_more_tokens

TOKENIZER_FILE = "tokenizer.json"
READ = (TOKENIZER_FILE, "tokenizer_config.json", "config.json", "chat_template.jinja", "chat_template.json", "merges.txt")
"""What of a folder is read, if it is there."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMES = {
    (_WORDS % r"\p{N}", False): "qwen2",
    (_WORDS % r"\p{N}{1,3}", True): "llama-bpe",
    (_WORDS % r"\p{N}{1,3}", False): "smaug-bpe",
}
"""The expression that cuts words, whether a word that is a token is one whatever the merges say, and what runtimes call both."""
_SENTENCEPIECE = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Metaspace", "replacement": "▁", "split": False},
)
"""What a tokenizer of SentencePiece's kind does before its merges, in the words of tokenizer.json."""
_WITHOUT = "export_gguf(..., tokenizer=None) writes the weights alone"
_PADDING, _NO_SCORE = "[PAD{}]", -1000.0


class _Token(NamedTuple):
    text: str
    kind: gguf.TokenType
    score: float = _NO_SCORE


class Vocabulary(NamedTuple):
    """A tokenizer as the metadata of a file says it."""

    pre: str | None
    """What runtimes call the way in which words are cut; None for SentencePiece's."""
    tokens: list[_Token]
    begins_with_space: bool
    special: gguf.SpecialVocab

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write it to a file whose metadata is not written yet."""
        writer.add_tokenizer_model("llama" if self.pre is None else "gpt2")
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list([token.text for token in self.tokens])
        writer.add_token_types([token.kind for token in self.tokens])
        if self.pre is None:
            writer.add_token_scores([token.score for token in self.tokens])
            writer.add_add_space_prefix(self.begins_with_space)
        self.special.add_to_gguf(writer, quiet=True)


def vocabulary_of(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a folder.

    Args:
        folder: with tokenizer.json, and what lies beside it.
        size: tokens that the model's embedding has; a tokenizer may have fewer.

    Raises:
        ExportError: there is no such file, it is damaged, or it describes a tokenizer that runtimes have no name for.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ExportError(f"'{folder}' has no {TOKENIZER_FILE}. Give the folder that tokenizer.save_pretrained wrote. {_WITHOUT}")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        pre = _pre_tokenizer_of(described)
        tokens, begins_with_space = _tokens_of(described, size), _begins_with_space(described)
        special = gguf.SpecialVocab(folder, load_merges=pre is not None, n_vocab=size)  # SentencePiece's scores say what merges do
        special.add_special_token.setdefault("bos", False)  # where nothing says it a runtime has a default of its own
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a damaged description leads to
        raise ExportError(f"'{path}', or a file beside it, is no tokenizer that can be read: {type(error).__name__}: {error}") from error
    return Vocabulary(pre, tokens, begins_with_space, special)


def _steps(described: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer's normalizer or pre_tokenizer."""
    whole = described.get(part) or {}
    return whole.get("normalizers") or whole.get("pretokenizers") or [whole] * bool(whole)


def _pre_tokenizer_of(described: dict[str, Any]) -> str | None:
    """What runtimes call the way in which words are cut; None for SentencePiece's."""
    model, normalizers, steps = described["model"], _steps(described, "normalizer"), _steps(described, "pre_tokenizer")
    if model["type"] != "BPE":
        raise ExportError(f"the tokenizer is a {model['type']}, and a GGUF file of a decoder holds BPE alone. {_WITHOUT}")
    if not model["merges"]:
        raise ExportError(f"the tokenizer has no merges, and runtimes read no BPE without any. {_WITHOUT}")
    takes_whole_words = bool(model.get("ignore_merges"))
    if model.get("byte_fallback"):
        unknown = [each for each in (*normalizers, *steps) if not any(known.items() <= each.items() for known in _SENTENCEPIECE)]
        name = None
    else:
        unknown = [each for each in normalizers if each["type"] != "NFC"]
        name = _name_of_cuts(steps, takes_whole_words)
    unknown += [{key: model[key]} for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if unknown:
        raise ExportError(f"the tokenizer changes texts by {json.dumps(unknown)[:300]}, which runtimes do not. {_WITHOUT}")
    if takes_whole_words and name != "llama-bpe":
        raise ExportError(f"the tokenizer ignores merges for words that are tokens, which runtimes do for Llama 3's alone. {_WITHOUT}")
    return name


def _name_of_cuts(steps: list[dict[str, Any]], takes_whole_words: bool) -> str:
    """What runtimes call the way in which a byte-level tokenizer cuts words."""
    *before, last = steps or [{}]
    cuts, kinds = last.get("use_regex", True), [step["type"] for step in before]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if cuts and not before:
            return "gpt-2"
        if cuts and kinds == ["Digits"] and before[0]["individual_digits"]:
            return "smollm"
        if not cuts and kinds == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0].get("invert"):
            expression = before[0]["pattern"].get("Regex")
            if name := _NAMES.get((expression, takes_whole_words)) or _NAMES.get((expression, False)):
                return name
    raise ExportError(
        f"the tokenizer cuts words in a way that has no name here: {json.dumps(steps)[:300]}. Known are those of "
        f"gpt-2, smollm, {', '.join(_NAMES.values())}. {_WITHOUT}"
    )


def _begins_with_space(described: dict[str, Any]) -> bool:
    """Whether SentencePiece's tokenizer puts a space in front of a text."""
    spaces = [step.get("prepend_scheme") != "never" for step in _steps(described, "pre_tokenizer") if step["type"] == "Metaspace"]
    return any(spaces) or any(step["type"] == "Prepend" for step in _steps(described, "normalizer"))


def _tokens_of(described: dict[str, Any], size: int) -> list[_Token]:
    """One token for each row of the embedding; those that the tokenizer lacks are marked as unused."""
    model = described["model"]
    tokens = {index: _Token(_PADDING.format(index), gguf.TokenType.UNUSED) for index in range(size)}
    scores = _scores(model) if model.get("byte_fallback") else {}
    for text, index in model["vocab"].items():
        is_byte = bool(scores) and re.fullmatch("<0x[0-9A-F]{2}>", text)
        kind = gguf.TokenType.BYTE if is_byte else gguf.TokenType.UNKNOWN if text == model.get("unk_token") else gguf.TokenType.NORMAL
        tokens[index] = _Token(text, kind, scores.get(text, _NO_SCORE))
    for added in described.get("added_tokens") or ():
        if (known := tokens.get(added["id"])) is None or known.kind != gguf.TokenType.UNKNOWN:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]] = _Token(added["content"], kind)
    refuse_more_tokens(max(tokens) + 1, size)
    return [tokens[index] for index in range(size)]


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """The score of each token that is merged of two: SentencePiece merges the pair of the highest score first, so it is the rank."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(model["merges"]):
        scores.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), -float(rank))
    return scores
