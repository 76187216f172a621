"""GLUE's tab-separated files of sentence pairs (MNLI)."""

from pathlib import Path

from recipes.common.recipe import Lacking

LABELS = ("entailment", "neutral", "contradiction")
_COLUMNS = ("sentence1", "sentence2", "gold_label")
Pairs = tuple[list[tuple[str, str]], list[int]]


def read_pairs(path: Path, limit: int = 0) -> Pairs:
    """Sentence pairs and the numbers of their labels; lines without a label that counts (``-``) are left out.

    Args:
        path: a file whose first line names the columns, with ``sentence1``, ``sentence2`` and ``gold_label`` among them.
        limit: so many; 0 for all.
    """
    if not path.is_file():
        raise Lacking(
            f"there is no {path}: the recipe reads MNLI as GLUE has it, train.tsv and dev_matched.tsv.\n"
            "  Get MNLI.zip at https://gluebenchmark.com/tasks and unpack it there."
        )
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # not splitlines: sentences hold other ends of lines
    except UnicodeDecodeError as wrong:
        raise Lacking(f"{path} is no text in UTF-8: {wrong}. Get it again.") from wrong
    names = lines[0].rstrip("\r").split("\t")
    if lacking := [each for each in _COLUMNS if each not in names]:
        raise Lacking(f"{path} has the columns {', '.join(names)}, it lacks {', '.join(lacking)}. The test files of GLUE have no labels.")
    first, second, label = (names.index(each) for each in _COLUMNS)
    pairs: list[tuple[str, str]] = []
    labels: list[int] = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(names):
            raise Lacking(f"{path}, line {number} has {len(cells)} cells, the first line {len(names)}. Get it again.")
        if cells[label] in LABELS:
            pairs.append((cells[first], cells[second]))
            labels.append(LABELS.index(cells[label]))
        elif cells[label] != "-":
            raise Lacking(f"{path}, line {number} has the label {cells[label]!r}, expected one of {', '.join(LABELS)}, or -.")
        if limit and len(labels) == limit:
            break
    if not pairs:
        raise Lacking(f"{path} has no pair with a label. Get it again.")
    return pairs, labels
