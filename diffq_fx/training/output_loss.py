"""How far a model's outputs are from those of its teacher: class scores by their distributions, features by their error."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffq_fx.example import Example

Kind = Literal["auto", "scores", "features"]

_BESIDE = ("loss", "past_key_values", "hidden_states", "attentions", "cross_attentions")
"""Outputs of transformers that are no answer, or repeat what is inside the model."""
_SURE, _LARGEST = 0.5, 1e4
"""Scores of classes choose: their entropy is below this part of that of all classes alike, and the choice differs from row to row. Larger
numbers are features, of which softmax would have one alone."""
_PIECE = 1 << 22
"""Scores that are compared at a time: what the gradient needs of all scores of 50,000 tokens takes as much as a small model."""
_IMAGE_DIMS = 4
"""Scores of so many dimensions have the classes in the second, others in the last."""


def output_loss(
    outputs: Any, teacher_outputs: Any, *, scores: Collection[str] | None = None, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """How far the outputs of a model are from those of its teacher, the mean over the tensors that are :func:`compared`.

    - Class scores, next-token logits too: ``T^2 KL(softmax(t / T) || softmax(s / T))``, mean over rows (arXiv:1503.02531). Classes are in
      the last dimension, those of tensors with four or more in the second.
    - Features, and what regressions give: ``sum (s - t)^2 / sum t^2``, the squared error relative to the teacher's power.

    Args:
        outputs: a tensor, or tensors in dicts, dataclasses, tuples and lists.
        teacher_outputs: the same; no gradient goes there. Where both have one tensor to compare, its name does not matter.
        scores: names of the teacher's outputs that are class scores; by default what :func:`scores_among` finds.
        temperature: T, positive.
        mask: 1 or True for rows that count, such as an attention mask of shape (samples, tokens); or 0 for these and large negative numbers
            for the others, as it is added to scores. It is for tensors that have its shape in front of their last dimension (that of the
            classes) or more.

    Returns:
        0-d, float32 or wider, whatever autocast says.

    Raises:
        ValueError: there is nothing to compare, names or shapes differ, or the mask fits no tensor.

    Example:
        >>> one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])
        >>> output_loss({"logits": one}, {"logits": one}).item(), output_loss(one, other, scores=()).item()
        (0.0, 0.25)
    """
    own, wanted = _alike(compared(outputs), compared(teacher_outputs))
    if mask is not None and not any(_fits(mask, each) for each in own.values()):
        shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in own.items())
        raise ValueError(f"output_loss: the mask of shape {tuple(mask.shape)} is of no rows of the outputs, which are {shapes}.")
    scores = scores_among(wanted) if scores is None else scores
    terms = [_distance(own[name], teacher.detach(), name in scores, temperature, mask) for name, teacher in wanted.items()]
    return torch.stack(terms).mean()


def _distance(student: Tensor, teacher: Tensor, is_scores: bool, temperature: float, mask: Tensor | None) -> Tensor:
    student, teacher = (each if each.dtype == torch.float64 else each.float() for each in (student, teacher))
    is_scores = is_scores and student.shape[_class_axis(student)] > 1  # one score a row is a regression
    if is_scores:
        student, teacher = (each.movedim(_class_axis(each), -1) for each in (student, teacher))
    rows = teacher.numel() // teacher.shape[-1]
    if mask is not None and _fits(mask, student):
        counts = _rows_that_count(mask).view(*mask.shape, *(1,) * (student.dim() - mask.dim()))
        student, teacher = student.where(counts, 0), teacher.where(counts, 0)  # before they are compared: a padded row may be NaN
        rows = (counts.sum() * rows / counts.numel()).clamp(min=1)
    if not is_scores:
        largest = teacher.abs().amax()
        largest = torch.where(largest > 0, largest, 1)  # of a teacher that says nothing else than zero, the error itself
        factor = largest.new_ones(()).ldexp(-largest.frexp().exponent)  # a power of two: squares of 1e20 and of 1e-20 stay in range
        student, teacher = student * factor, teacher * factor
        power = teacher.square().sum()
        return (student - teacher).square().sum() / torch.where(power > 0, power, teacher.numel() * factor.square())
    if student.numel() <= _PIECE:
        return _divergence(student, teacher, temperature) / rows
    pieces = zip(*(each.flatten(0, -2).split(max(_PIECE // each.shape[-1], 1)) for each in (student, teacher)), strict=True)
    parts = [checkpoint(_divergence, *piece, temperature, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.stack(parts).sum() / rows


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))``, the sum over rows."""
    lowest = torch.finfo(teacher.dtype).min  # classes that minus infinity rules out differ by nothing, and not by NaN
    student, teacher = (F.log_softmax(each / temperature, -1).clamp(min=lowest) for each in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def compared(outputs: Any) -> dict[str, Tensor]:
    """What of a model's outputs is compared: those named ``logits``, ``scores`` or ``..._logits`` alone, where there are any.

    Losses, caches, and the states and attentions within the model are not compared.

    Example:
        >>> list(compared({"loss": torch.ones(()), "logits": torch.ones(1, 2), "features": torch.ones(1, 2)}))
        ['logits']
    """
    found = {name: each for name, each in outputs_of(outputs).items() if each.numel() and each.dim() and name.split(".")[0] not in _BESIDE}
    return {name: each for name, each in found.items() if _is_named_scores(name)} or found


def outputs_of(tree: Any, name: str = "output") -> dict[str, Tensor]:
    """The float tensors of a model's output by their names: of tuples, dicts and dataclasses, as transformers has them.

    Example:
        >>> list(outputs_of({"logits": torch.zeros(1, 2), "more": (torch.zeros(1), torch.zeros(1, dtype=torch.int64))}))
        ['logits', 'more.0']
    """
    if isinstance(tree, Tensor):
        return {name: tree} if tree.is_floating_point() else {}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type | Mapping):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        tree = dict(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    if not isinstance(tree, Mapping):
        return {}
    prefix = "" if name == "output" else f"{name}."
    return {path: leaf for key, value in tree.items() for path, leaf in outputs_of(value, f"{prefix}{key}").items()}


def scores_among(outputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Which outputs are scores of classes: by their names, or because their rows choose, and not all the same.

    Example:
        >>> scores_among({"a": torch.eye(4) * 9, "b": torch.ones(4, 4)})
        frozenset({'a'})
    """
    return frozenset(name for name, each in outputs.items() if _is_named_scores(name) or _choose(each.detach()))


def scores_of(kind: Kind, outputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Which outputs are class scores: all, none, or ("auto") what :func:`scores_among` finds."""
    return scores_among(outputs) if kind == "auto" else frozenset(outputs if kind == "scores" else ())


def refuse_kind(caller: str, kind: str) -> None:
    """Refuse what is no :data:`Kind`."""
    if kind not in get_args(Kind):
        raise ValueError(f"{caller}: kind must be one of {get_args(Kind)}, got {kind!r}.")


def _is_named_scores(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("logits", "scores") or last.endswith("_logits")


def _choose(outputs: Tensor) -> bool:
    if outputs.dim() < 2 or (classes := outputs.shape[_class_axis(outputs)]) < 2:
        return False
    rows = outputs.float().movedim(_class_axis(outputs), -1).flatten(0, -2)
    log_share = rows.log_softmax(-1)
    entropy = -(log_share.exp() * log_share).sum(-1).mean() / math.log(classes)
    return bool(entropy < _SURE) and bool(rows.amax() < _LARGEST) and rows.argmax(-1).unique().numel() > 1


def _class_axis(outputs: Tensor) -> int:
    return 1 if outputs.dim() >= _IMAGE_DIMS else -1


def attention_mask(example: Example, outputs: Any) -> Tensor | None:
    """The ``attention_mask`` among the inputs, where what is compared has a row for each token."""
    mask = example.kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and any(_fits(mask, each) for each in compared(outputs).values()) else None


def _fits(mask: Tensor, output: Tensor) -> bool:
    return mask.dim() < output.dim() and output.shape[: mask.dim()] == mask.shape


def _rows_that_count(mask: Tensor) -> Tensor:
    if not mask.is_floating_point():
        return mask.bool()
    is_added = (mask.amax() <= 0) & (mask.amin() < 0)  # to scores, as 0 and a large negative number
    return torch.where(is_added, mask == 0, mask.bool())


def _alike(own: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both under the teacher's names.

    Raises:
        ValueError: they are not of the same names and shapes.
    """
    if len(own) == len(wanted) == 1:
        own = dict(zip(wanted, own.values(), strict=True))
    if not own or own.keys() != wanted.keys():
        ours, theirs = (", ".join(each) or "no floating-point tensor" for each in (own, wanted))
        raise ValueError(
            f"output_loss: the outputs to compare are {ours}; the teacher gives {theirs}.\n"
            "  Give the part of the model's outputs that the teacher gives too, or a teacher that gives the same."
        )
    for name, each in own.items():
        if each.shape != wanted[name].shape:
            raise ValueError(f"output_loss: {name} has shape {tuple(each.shape)}, the teacher's has {tuple(wanted[name].shape)}.")
    return own, wanted
