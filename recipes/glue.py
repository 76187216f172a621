"""MNLI with RoBERTa: Quant-Noise in training, then iPQ, layer group by layer group (arXiv:2004.07320).

    python -m recipes.glue --data MNLI --pretrained FOLDER --method pq --out runs/ipq
    python -m recipes.glue --data MNLI --method diffq --bits 3 --out runs/small

MNLI holds train.tsv and dev_matched.tsv as GLUE has them. FOLDER is that of a RoBERTa of Hugging Face with its tokenizer; without it a
small encoder with a tokenizer of its own is trained from scratch.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.main import main
from recipes.common.recipe import Batch, Lacking, Recipe
from recipes.common.settings import Settings
from recipes.data.glue import LABELS, Pairs, read_pairs

_PAD = 1
"""As in RoBERTa: <s>, <pad>, </s>, <unk>."""


@dataclass(kw_only=True)
class GlueSettings(Settings):
    """AdamW, a rate that rises and falls; pq has blocks of 8 weights, 256 entries and a fifth of the blocks noised."""

    model: Literal["roberta"] = "roberta"
    """The encoder."""
    pretrained: Path | None = None
    """Folder of a RoBERTa of Hugging Face; without it a small one from scratch."""
    test_file: str = "dev_matched.tsv"
    """What to test on, within the folder of the data."""
    length: int = 128
    """Tokens of a pair; longer ones are cut."""
    words: int = 8000
    """Size of the tokenizer that is made where there is no --pretrained."""
    width: int = 256
    """Of the small encoder."""
    layers: int = 4
    """Of the small encoder."""
    epochs: float = 3
    """Length of the training."""
    batch_size: int = 32
    """Of all processes together."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    """Of the weights."""
    weight_decay: float = 0.01
    """Of the weights."""
    warm_up: float = 0.06
    """Share of the training in which the rate rises."""
    lr: float = 3e-5
    """Learning rate of the weights at the start."""

    @classmethod
    def preset(cls, model: str, method: str) -> dict[str, Any]:
        """The Quant-Noise authors' block noise for RoBERTa."""
        return {"bits": 8, "noise_rate": 0.2} if method == "pq" else {}


class Encoder(nn.Module):
    """RoBERTa with a head for pairs: token ids and their mask to scores of the labels."""

    def __init__(self, roberta: nn.Module) -> None:
        super().__init__()
        self.roberta = roberta

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores, shape (pairs, 3)."""
        return self.roberta(input_ids=ids, attention_mask=mask).logits


class Glue(Recipe[GlueSettings]):
    """Accuracy on MNLI's matched pairs."""

    name, score_name = "glue", "accuracy in %"
    settings_type: ClassVar = GlueSettings

    def load(self) -> None:
        """The pairs as token ids on the device."""
        settings = self.settings
        for package in ("transformers", "tokenizers"):
            if importlib.util.find_spec(package) is None:
                raise Lacking(f"The recipe glue needs {package}: pip install {package}.")
        train, test = (read_pairs(settings.data / name, settings.limit) for name in ("train.tsv", settings.test_file))
        self.tokenizer = self._tokenizer(train)
        self.tokenizer.enable_truncation(settings.length)
        self.tokenizer.enable_padding(length=settings.length, pad_id=_PAD, pad_token="<pad>")
        self.train, self.test = self._tokens(train), self._tokens(test)

    def _tokenizer(self, train: Pairs) -> Any:
        """That of the pretrained model, or byte-pair encoding of the training sentences with RoBERTa's special tokens."""
        import tokenizers

        folder = self.settings.pretrained
        if folder is not None:
            if not (folder / "tokenizer.json").is_file():
                raise Lacking(f"--pretrained {folder} has no tokenizer.json: save the tokenizer there with save_pretrained.")
            try:
                return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as wrong:  # the package raises no narrower kind
                raise Lacking(f"--pretrained {folder}: tokenizer.json cannot be read: {wrong}. Save the tokenizer there again.") from wrong
        made = tokenizers.ByteLevelBPETokenizer(lowercase=True)
        sentences = (sentence for pair in train[0] for sentence in pair)
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        made.train_from_iterator(sentences, self.settings.words, special_tokens=special, show_progress=False)
        made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        return made

    def _tokens(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        encoded = self.tokenizer.encode_batch(pairs[0])
        rows = ([each.ids for each in encoded], [each.attention_mask for each in encoded], pairs[1])
        return tuple(torch.tensor(each).to(self.device) for each in rows)  # pyright: ignore[reportReturnType]

    def make_model(self) -> nn.Module:
        """The pretrained encoder with a new head, or a small one."""
        from transformers import RobertaConfig, RobertaForSequenceClassification

        settings = self.settings
        if settings.pretrained is not None:
            given = {"local_files_only": True, "num_labels": len(LABELS)}
            try:
                return Encoder(RobertaForSequenceClassification.from_pretrained(settings.pretrained, **given))
            except (OSError, ValueError) as wrong:
                raise Lacking(f"--pretrained {settings.pretrained} is no RoBERTa of Hugging Face: {wrong}") from wrong
        config = RobertaConfig(
            vocab_size=self.tokenizer.get_vocab_size(),
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=max(settings.width // 64, 1),
            intermediate_size=4 * settings.width,
            max_position_embeddings=settings.length + 2,
            num_labels=len(LABELS),
        )
        return Encoder(RobertaForSequenceClassification(config))

    @property
    def examples(self) -> int:
        """Pairs to train on."""
        return len(self.train[2])

    def take(self, pick: Tensor) -> Batch:
        """Token ids and mask, and labels."""
        ids, mask, labels = self.train
        return (ids[pick], mask[pick]), labels[pick]

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(output.float(), target)

    def test_batches(self) -> Iterator[Batch]:
        """All test pairs, 64 at a time."""
        for ids, mask, labels in zip(*(each.split(64) for each in self.test), strict=True):
            yield (ids, mask), labels

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Accuracy."""
        return {"score": 100 * float((torch.cat(outputs).argmax(1) == torch.cat(targets)).double().mean())}

    def groups_for_ipq(self, names: list[str]) -> list[list[str]]:
        """The Quant-Noise paper's order: feed-forward layers, embeddings, attention and the head."""
        feed_forward = [name for name in names if ".intermediate." in name or (".output." in name and ".attention." not in name)]
        return [feed_forward, ["*embeddings*"], ["*"]]


if __name__ == "__main__":
    main(Glue)
