"""Word-level language model: the 16-layer transformer with adaptive input on WikiText-103, or a small one on less text.

    python -m recipes.language --data wikitext-103 --model wiki103 --method diffq-paper --penalty 1 --out runs/wiki103
    python -m recipes.language --data DIR --model small --train-file wikitext2_valid.txt --test-file wikitext2_test.txt --out runs/small

DIR holds WikiText's token files. Words are those of the training text; a word that is not is <unk>.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common.main import main
from recipes.common.recipe import Batch, Recipe
from recipes.common.settings import Settings
from recipes.data.wikitext import numbers, read_words, vocabulary
from recipes.models.language import AdaptiveTransformer

_SIZES: dict[str, dict[str, Any]] = {
    "wiki103": {},
    "small": {"cutoffs": (2000, 6000), "width": 256, "heads": 4, "hidden": 1024, "layers": 4, "layer_drop": 0.0},
}


@dataclass(kw_only=True)
class LanguageSettings(Settings):
    """The small model by AdamW; wiki103 by Nesterov's SGD at a rate of 1 with momentum 0.99, as the paper's public setting has it."""

    model: Literal["wiki103", "small"] = "small"
    """The transformer."""
    train_file: str = "wiki.train.tokens"
    """Text to train on, within the folder of the data."""
    test_file: str = "wiki.test.tokens"
    """Text to test on."""
    least_count: int = 1
    """Words that come up less often in the training text are <unk>."""
    context: int = 128
    """Words in a window; the test has windows of the same length."""
    epochs: float = 20
    """Length of the training."""
    batch_size: int = 16
    """Windows, of all processes together."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    """Of the weights; sgd has Nesterov momentum."""
    lr: float = 1e-3
    """Learning rate of the weights at the start."""
    weight_decay: float = 0.01
    """Of the weights."""
    warm_up: float = 0.05
    """Share of the training in which the rate rises."""
    clip_norm: float = 1.0
    """Largest norm of the gradients; 0 for none."""

    @classmethod
    def preset(cls, model: str, method: str) -> dict[str, Any]:
        """The paper's settings of the large model."""
        if model == "small":
            return {}
        large = {"optimizer": "sgd", "lr": 1.0, "momentum": 0.99, "weight_decay": 0.0, "context": 512, "clip_norm": 0.1, "min_size": 2622}
        return {**large, "group": "16"} if method == "diffq-paper" else large


class Language(Recipe[LanguageSettings]):
    """Perplexity per word."""

    name, score_name, higher_is_better = "language", "perplexity per word", False
    settings_type: ClassVar = LanguageSettings

    def load(self) -> None:
        """The texts as numbers, in windows."""
        settings = self.settings
        train, test = (settings.data / name for name in (settings.train_file, settings.test_file))
        lines = settings.limit * settings.context  # a line with words has two of them at least
        self.known = vocabulary(read_words(train, lines), settings.least_count)
        self.train, self.test = (self._windows(numbers(read_words(path, lines), self.known)) for path in (train, test))

    def _windows(self, words: Any) -> Tensor:
        """Rows of ``context + 1`` words, of which the last is the first of the next row: every word but the first is predicted once."""
        context = self.settings.context
        count = (len(words) - 1) // context
        if not count:
            raise SystemExit(f"--context {context}: a text of {len(words)} words has no such window.")
        count = min(count, self.settings.limit or count)
        return torch.from_numpy(words[: count * context + 1]).unfold(0, context + 1, context).contiguous().to(self.device)

    def make_model(self) -> nn.Module:
        """The transformer for the words of the training text."""
        return AdaptiveTransformer(len(self.known), **_SIZES[self.settings.model], context=self.settings.context)

    @property
    def examples(self) -> int:
        """Windows to train on."""
        return len(self.train)

    def take(self, pick: Tensor) -> Batch:
        """Windows, and the words that follow."""
        rows = self.train[pick]
        return (rows[:, :-1].contiguous(),), rows[:, 1:]

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy per word."""
        return F.nll_loss(output.flatten(0, 1), target.flatten())

    def test_batches(self) -> Iterator[Batch]:
        """All windows of the test text."""
        for rows in self.test.split(16):
            yield (rows[:, :-1].contiguous(),), rows[:, 1:]

    def reduce(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of the losses."""
        return F.nll_loss(output.flatten(0, 1).double(), target.flatten(), reduction="sum")

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Perplexity, and the size of the vocabulary, without which it says nothing."""
        count = sum(target.numel() for target in targets)
        return {"score": math.exp(float(torch.stack(outputs).sum()) / count), "words": len(self.known)}

    def groups_for_ipq(self, names: list[str]) -> list[list[str]]:
        """The Quant-Noise paper's order: feed-forward layers, embeddings, attention."""
        return [["*.up.*", "*.down.*"], ["bands.*"], ["*"]]


if __name__ == "__main__":
    main(Language)
