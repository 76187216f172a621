"""WikiText: files of words with blanks between them, of which each line ends a sentence."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from recipes.common.recipe import Lacking

_END, _UNKNOWN = "<eos>", "<unk>"


def read_words(path: Path, limit: int = 0) -> Iterator[str]:
    """All words of a file, with ``<eos>`` after each line that has any; those of the first ``limit`` lines where that is not 0."""
    if not path.is_file():
        raise Lacking(
            f"there is no {path}: the recipe reads WikiText's token files.\n"
            "  Get wikitext-103-v1.zip (Merity et al., arXiv:1609.07843) and unpack wiki.train.tokens and wiki.test.tokens there;\n"
            "  files of other names go by --train-file and --test-file."
        )
    found = False
    try:
        with path.open(encoding="utf-8") as file:
            for line in itertools.islice(file, limit or None):
                if line.strip():
                    found = True
                    yield from (*line.split(), _END)
    except UnicodeDecodeError as wrong:
        raise Lacking(f"{path} is no text in UTF-8: {wrong}. Get it again.") from wrong
    if not found:
        raise Lacking(f"{path} has no words. Get it again.")


def vocabulary(words: Iterable[str], least: int = 1) -> dict[str, int]:
    """Numbers of the words that come up at least so often, the most frequent first, and of what stands for all others."""
    counts = Counter(words)
    counts[_UNKNOWN] += 1
    kept = sorted((word for word, count in counts.items() if count >= least or word == _UNKNOWN), key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(kept)}


def numbers(words: Iterable[str], known: dict[str, int]) -> np.ndarray:
    """The words as int64."""
    unknown = known[_UNKNOWN]
    return np.fromiter((known.get(word, unknown) for word in words), np.int64)
