"""Distillation: the float model teaches the one that is compressed (Hinton, Vinyals, Dean, arXiv:1503.02531)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.capture.copies import copy_replacing
from diffq_fx.compression import Compression, require_compressions
from diffq_fx.errors import PreparationError
from diffq_fx.example import Example
from diffq_fx.parts import CHILD, parts_of, unwrapped
from diffq_fx.sharded import is_sharded, own_part

Kind = Literal["auto", "scores", "features"]

_IMAGE_DIMS = 4
"""Scores of so many dimensions have the classes in the second, others in the last."""


class Distillation:
    """A frozen teacher of a prepared model: its loss is one line in a training loop, in place of the task's own or added to it.

    Make it right after ``prepare``: a prepared model shares its Parameters with the float model, which trains along with it. So the teacher
    is a copy of the float model, in eval mode and without gradients: the memory of its weights, and one forward without gradients a
    step. It is no part of the prepared model: not of its parameters, its state_dict, its copies, nor of what is converted and exported.

    Args:
        model: prepared, not trained yet; wrapped or not.
        teacher: another model to follow, with the inputs and the outputs of the prepared one. If it shares memory with the prepared model,
            it is copied, as is the float model by default; if not, it is taken as it is and put into eval mode.
        temperature: see :func:`output_loss`.
        kind: see :func:`output_loss`.

    Raises:
        PreparationError: the model is not prepared; its float weights have trained already, or are sharded over ranks.
        TypeError: the teacher is not a module.
        ValueError: a setting is out of its range.

    Example:
        >>> from diffq_fx import prepare_diffq
        >>> model = prepare_diffq(nn.Linear(32, 32), torch.zeros(1, 32))
        >>> distill = Distillation(model)
        >>> inputs = torch.randn(4, 32)  # no labels
        >>> distill(inputs, model(inputs)).backward()
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None, *, temperature: float = 4.0, kind: Kind = "auto") -> None:
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"Distillation: teacher must be a module or None, got {type(teacher).__name__}.")
        _check_settings("Distillation", kind, temperature)
        compressions = require_compressions(model, "Distillation")
        chosen = unwrapped(model if teacher is None else teacher)
        self._is_copy = not _memory_of(chosen).isdisjoint(_memory_of(model))
        self.teacher = _float_copy(chosen, compressions) if self._is_copy else chosen
        self.temperature = temperature
        self.kind: Kind = kind

    def __call__(self, inputs: Any, outputs: Any, *, mask: Tensor | None = None) -> Tensor:
        """The loss to minimize, :func:`output_loss` of the outputs and the teacher's.

        Args:
            inputs: what the model was called with: a tensor, a tuple of positional or a dict of keyword arguments.
            outputs: what it gave for them, or the part of that to compare.
            mask: see :func:`output_loss`; by default the ``attention_mask`` of the inputs, where outputs have a row for each token.

        Returns:
            0-d, float32 or wider.

        Raises:
            ValueError: the outputs are not those of the teacher in structure or shape.
        """
        example = Example.of(inputs)
        if mask is None:
            mask = _attention_mask(example, outputs)
        return output_loss(outputs, self._answers(example), kind=self.kind, temperature=self.temperature, mask=mask)

    @torch.no_grad()
    def _answers(self, example: Example) -> Any:
        devices = {parameter.device for parameter in self.teacher.parameters()}
        near = next((tensor.device for tensor in example.tensors), None)
        if self._is_copy and near is not None and len(devices) == 1 and near not in devices:  # it follows the prepared model
            self.teacher.to(near)
        return self.teacher.eval()(*example.args, **example.kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        """The same one: a frozen teacher serves every copy of a model."""
        return self


def output_loss(outputs: Any, teacher_outputs: Any, *, kind: Kind = "auto", temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """How far the outputs of a model are from those of its teacher, the mean over the tensors in them.

    - Class scores, next-token logits too: ``T^2 KL(softmax(t / T) || softmax(s / T))``, mean over rows (arXiv:1503.02531). Classes are in
      the last dimension, those of tensors with four or more in the second.
    - Features, what regressions give, and class scores that nothing names so: ``sum (s - t)^2 / sum t^2``, the squared error relative to
      the teacher's power. It serves class scores as well (arXiv:2105.08919).

    Outputs that are called ``logits``, or something that ends in ``_logits``, are class scores and are then compared alone. Losses, caches
    and what is not floating point are not compared.

    Args:
        outputs: a tensor, or tensors in dicts, dataclasses, tuples and lists.
        teacher_outputs: the same; no gradient goes there. Where both have one tensor to compare, its name does not matter.
        kind: "scores" or "features" for all tensors; "auto" for scores by their name, and features.
        temperature: T, positive.
        mask: 1 or True for rows that count, such as an attention mask of shape (samples, tokens), in the tensors that have its shape in
            front of their last dimension (that of the classes) or more.

    Returns:
        0-d, float32 or wider, whatever autocast says.

    Raises:
        ValueError: there is nothing to compare, names or shapes differ, or the mask fits no tensor.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0]])
        >>> output_loss({"logits": scores}, {"logits": scores}).item(), output_loss(scores, 2 * scores).item()
        (0.0, 0.25)
    """
    _check_settings("output_loss", kind, temperature)
    pairs = _pairs(outputs, teacher_outputs, kind)
    if mask is not None and not any(_fits(mask, pair.student) for pair in pairs):
        shapes = ", ".join(f"{pair.name} {tuple(pair.student.shape)}" for pair in pairs)
        raise ValueError(f"output_loss: the mask of shape {tuple(mask.shape)} is of no rows of the outputs, which are {shapes}.")
    return torch.stack([_distance(pair, temperature, mask) for pair in pairs]).mean()


class _Pair(NamedTuple):
    """What is compared: float32 or wider, classes in the last dimension."""

    name: str
    student: Tensor
    teacher: Tensor
    is_scores: bool


def _distance(pair: _Pair, temperature: float, mask: Tensor | None) -> Tensor:
    _, student, teacher, is_scores = pair
    rows = teacher.numel() // teacher.shape[-1] if is_scores else 1
    if mask is not None and _fits(mask, student):
        counts = mask.bool().view(*mask.shape, *(1,) * (student.dim() - mask.dim()))
        student, teacher = student.where(counts, 0), teacher.where(counts, 0)  # before they are compared: a padded row may be NaN
        rows = (counts.sum() * rows / counts.numel()).clamp(min=1)
    if not is_scores:
        return (student - teacher).square().sum() / teacher.square().sum().clamp(min=torch.finfo(teacher.dtype).tiny)
    lowest = torch.finfo(teacher.dtype).min  # classes that minus infinity rules out differ by nothing, and not by NaN
    student, teacher = (F.log_softmax(each / temperature, -1).clamp(min=lowest) for each in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum") / rows


def _fits(mask: Tensor, output: Tensor) -> bool:
    return mask.dim() < output.dim() and output.shape[: mask.dim()] == mask.shape


def _pairs(outputs: Any, teacher_outputs: Any, kind: Kind) -> list[_Pair]:
    own, wanted = _compared(outputs), _compared(teacher_outputs)
    if len(own) == len(wanted) == 1:
        name = next((each for each in (*own, *wanted) if _is_scores(each)), next(iter(own)))
        own, wanted = ({name: next(iter(each.values()))} for each in (own, wanted))
    if not own or own.keys() != wanted.keys():
        ours, theirs = (", ".join(each) or "no floating-point tensor" for each in (own, wanted))
        raise ValueError(
            f"output_loss: the outputs to compare are {ours}; the teacher gives {theirs}.\n"
            "  Give the part of the model's outputs that the teacher gives too, or a teacher that gives the same."
        )
    pairs = []
    for name, tensor in own.items():
        if tensor.shape != (other := wanted[name]).shape:
            raise ValueError(f"output_loss: {name} has shape {tuple(tensor.shape)}, the teacher's has {tuple(other.shape)}.")
        axis = 1 if tensor.dim() >= _IMAGE_DIMS else -1
        is_scores = kind == "scores" or (kind == "auto" and _is_scores(name))
        is_scores = is_scores and tensor.dim() > 0 and tensor.shape[axis] > 1  # one score a row is a regression
        student, teacher = (each if each.dtype == torch.float64 else each.float() for each in (tensor, other.detach()))
        if is_scores:
            student, teacher = student.movedim(axis, -1), teacher.movedim(axis, -1)
        pairs.append(_Pair(name, student, teacher, is_scores))
    return pairs


def _compared(outputs: Any) -> dict[str, Tensor]:
    found = {name: each for name, each in _named(outputs, "") if each.is_floating_point() and each.numel()}
    return {name: each for name, each in found.items() if _is_scores(name)} or found


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's outputs by their paths, without losses and caches."""
    if isinstance(value, Tensor):
        yield name or "the output", value
        return
    parts: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        parts = value
    elif dataclasses.is_dataclass(value):
        parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif isinstance(value, tuple | list):
        parts = dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    for key, part in parts.items():
        if key not in ("loss", "past_key_values") and not str(key).endswith("_loss"):
            yield from _named(part, f"{name}.{key}" if name else str(key))


def _is_scores(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "logits" or last.endswith("_logits")


def _attention_mask(example: Example, outputs: Any) -> Tensor | None:
    mask = example.kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and any(_fits(mask, each) for each in _compared(outputs).values()) else None


def _check_settings(caller: str, kind: Kind, temperature: float) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"{caller}: kind must be one of {get_args(Kind)}, got {kind!r}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{caller}: temperature must be positive and finite, got {temperature}.")


def _float_copy(model: nn.Module, compressions: list[Compression]) -> nn.Module:
    """A float model with weights of its own, frozen: the model itself, where it is prepared without its quantizers."""
    for compression in compressions:
        if steps := compression.known.steps:
            raise PreparationError(
                f"Distillation: the teacher shares its weights with the prepared model, which has trained for {steps} steps: they are not "
                "those of the float model any more.\n  Make the Distillation right after prepare, before a checkpoint is loaded, or give a "
                "float model with weights of its own as teacher."
            )
        if sharded := next((quantizer.spec.name for quantizer in compression.quantizers if is_sharded(quantizer.weight)), None):
            raise PreparationError(f"Distillation: weight {sharded!r} is sharded over ranks. Make the Distillation before fully_shard.")
    prepared = [vars(part)[CHILD] for part in parts_of(model, Compression).values()]
    quantizers = {id(quantizer): nn.Identity() for compression in prepared for quantizer in compression.quantizers}
    return copy_replacing(model, {**quantizers, **dict.fromkeys(map(id, prepared))}).requires_grad_(False).eval()


def _memory_of(model: nn.Module) -> set[int]:
    """Where the values of all tensors are that a model holds, in plain attributes and in modules that are no children too."""
    found, left, seen = set[int](), [model], set[int]()
    while left:
        if id(module := left.pop()) in seen:
            continue
        seen.add(id(module))
        for leaf in _compat.tree_leaves(list(vars(module).values())):
            if isinstance(leaf, nn.Module):
                left.append(leaf)
            elif isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                found.add(own_part(leaf).untyped_storage().data_ptr())
    return found - {0}
