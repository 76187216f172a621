"""Distillation: the float model teaches the one that is compressed (Hinton, Vinyals, Dean, arXiv:1503.02531)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.capture.copies import copy_replacing
from diffq_fx.compression import Compression, require_compressions
from diffq_fx.errors import PreparationError
from diffq_fx.example import Example, in_eval
from diffq_fx.parts import CHILD, parts_of, unwrapped
from diffq_fx.sharded import is_sharded, own_part
from diffq_fx.training.output_loss import Kind, attention_mask, compared, output_loss, refuse_kind, scores_of


class Distillation:
    """A frozen teacher of a prepared model: its loss is one line in a training loop, in place of the task's own or added to it.

    Make it right after ``prepare``: a prepared model shares its Parameters with the float model, which trains along with it. So the teacher
    is a copy of the float model, in eval mode and without gradients: the memory of its weights, and one forward without gradients a
    step. It is no part of the prepared model: not of its parameters, its state_dict, its copies, nor of what is converted and exported.

    Args:
        model: prepared, not trained yet; wrapped or not.
        teacher: another model to follow, with the inputs and the outputs of the prepared one. If it shares memory with the prepared model,
            it is copied, as is the float model by default; if not, it is taken as it is, and its forwards are in eval mode.
        temperature: T of class scores, positive; see :func:`~diffq_fx.training.output_loss.output_loss`.
        kind: "scores" for class scores in all outputs, "features" for none; "auto" for those that are called so, or whose rows choose at
            the first call.

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
        refuse_kind("Distillation", kind)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise ValueError(f"Distillation: temperature must be a positive and finite number, got {temperature!r}.")
        compressions = require_compressions(model, "Distillation")
        chosen = unwrapped(model if teacher is None else teacher)
        self._is_copy = not _memory_of(chosen).isdisjoint(_memory_of(model))
        self.teacher = _float_copy(chosen, compressions) if self._is_copy else chosen
        self.temperature = temperature
        self.kind: Kind = kind
        self._scores: frozenset[str] | None = None

    def __call__(self, inputs: Any, outputs: Any, *, mask: Tensor | None = None) -> Tensor:
        """The loss to minimize: :func:`~diffq_fx.training.output_loss.output_loss` of the outputs and the teacher's.

        Args:
            inputs: what the model was called with: a tensor, a tuple of positional or a dict of keyword arguments.
            outputs: what it gave for them, or the part of that to compare.
            mask: 1 or True for rows that count; by default the ``attention_mask`` of the inputs, where outputs have a row for each token.

        Returns:
            0-d, float32 or wider.

        Raises:
            ValueError: the outputs are not those of the teacher in structure or shape.
        """
        example = Example.of(inputs)
        wanted = compared(self._answers(example))
        if self._scores is None:
            self._scores = scores_of(self.kind, wanted)
        if mask is None:
            mask = attention_mask(example, outputs)
        return output_loss(outputs, wanted, scores=self._scores, temperature=self.temperature, mask=mask)

    @torch.no_grad()
    def _answers(self, example: Example) -> Any:
        devices = {parameter.device for parameter in self.teacher.parameters()}
        near = next((tensor.device for tensor in example.tensors), None)
        if self._is_copy and near is not None and len(devices) == 1 and near not in devices:  # it follows the prepared model
            self.teacher.to(near)
        with in_eval(self.teacher):
            return self.teacher(*example.args, **example.kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        """The same one: a frozen teacher serves every copy of a model."""
        return self


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
