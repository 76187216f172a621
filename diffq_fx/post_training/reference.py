"""What a compressed model has to agree with: the float model's outputs, compared as scores of classes or as features."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffq_fx.capture.copies import copy_sharing_parameters
from diffq_fx.errors import PreparationError
from diffq_fx.example import Example, tensors_of
from diffq_fx.post_training.batches import CALLER, Calibration, refuse_labels
from diffq_fx.training.output_loss import Kind, attention_mask, compared, output_loss, outputs_of, scores_of
from diffq_fx.weights import not_finite

_KEPT_BYTES = 1 << 28
"""Outputs of the float model that are kept, in all, those of the held-out batches first; others are computed again at each step."""


class FloatOutputs:
    """The outputs of the float model (or of another teacher) on a batch, and how far those of a model are from them.

    The float model is run on a copy that shares its parameters, in eval(), without gradients.

    Args:
        model: the float model.
        teacher: what is imitated; the float model itself where it is None.
        data: the batches.
        kind: whether outputs are class scores; "auto" where they look so.

    Raises:
        ValueError: the model does not run on the first batch, its output is a loss, has no float tensor or is not finite, or the teacher's
            differs from it in structure; or it answers differently when it is asked again.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, data: Calibration, kind: Kind = "auto") -> None:
        first = data.tuned_on[0]
        self._model = _copy(model if teacher is None else teacher)
        self._role = "model" if teacher is None else "teacher"
        refuse_labels(self._model, first)
        wanted = _run(self._model, first, self._role)
        if teacher is not None:
            own = _run(student := _copy(model), first)
            _refuse_random(student, first, own, "model")
            if (ours := _shapes(own)) != (theirs := _shapes(wanted)):
                raise ValueError(f"{CALLER}: the teacher's outputs must be those of the model, {ours}; got {theirs}.")
        self._refuse_not_finite(wanted)
        _refuse_random(self._model, first, wanted, self._role)
        self._names, self._scores = tuple(wanted), scores_of(kind, wanted)
        keeps = int(_KEPT_BYTES / max(sum(tensor.nbytes for tensor in wanted.values()), 1))
        self._to_keep = {id(example) for example in (*data.held_out, *data.tuned_on)[:keeps]}
        self._kept: dict[int, Mapping[str, Tensor]] = {}

    @property
    def description(self) -> str:
        """What is compared, for the record."""
        kinds = ("KL divergence of class scores" if name in self._scores else "squared error" for name in self._names)
        return ", ".join(f"{kind} of {name}" for name, kind in zip(self._names, kinds, strict=True))

    def of(self, example: Example) -> Mapping[str, Tensor]:
        """The outputs on a batch."""
        if id(example) in self._kept:
            return self._kept[id(example)]
        wanted = _run(self._model, example, self._role)
        self._refuse_not_finite(wanted)
        if id(example) in self._to_keep:
            self._kept[id(example)] = wanted
        return wanted

    def distance(self, model: nn.Module, example: Example) -> Tensor:
        """How far a model's outputs are from them: mean over the outputs of a KL divergence or a relative squared error, 0-d."""
        wanted = self.of(example)  # first: it says what is wrong with a batch
        outputs = example.run(model)
        return output_loss(outputs, wanted, scores=self._scores, mask=attention_mask(example, outputs))

    def _refuse_not_finite(self, outputs: Mapping[str, Tensor]) -> None:
        for name, tensor in outputs.items():
            if where := not_finite(tensor):
                raise ValueError(
                    f"{CALLER}: the float {self._role}'s output {name} {where}. Look at it and the batch: it cannot be imitated."
                )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy_sharing_parameters(model).eval()
    except Exception as error:  # any object in the model may refuse to be copied
        raise PreparationError(
            f"{CALLER}: the {type(model).__name__} cannot be copied: {type(error).__name__}: {error}\n"
            "  An attribute of the model is in the way of copy.deepcopy(model)."
        ) from error


@torch.no_grad()
def _run(model: nn.Module, example: Example, role: str = "model") -> dict[str, Tensor]:
    """The outputs to compare."""
    try:
        output, _, _ = example.outcome(model, "eval without grad")
    except Exception as error:  # the user's forward may raise anything
        raise ValueError(
            f"{CALLER}: the {role}, a {type(model).__name__}, does not run on a batch ({example}).\n  {type(error).__name__}: {error}\n"
            "  A batch is what the model is called with: a tensor, a tuple of positional or a dict of keyword arguments, without labels. "
            "A model that needs labels or a loss is given as the part that makes the outputs."
        ) from error
    found = outputs_of(output)
    if any(name == "loss" or not tensor.ndim for name, tensor in found.items()):
        raise ValueError(
            f"{CALLER}: the {role}, a {type(model).__name__}, returns a loss, and what is imitated are its outputs: "
            "give the model without its loss, and batches without labels."
        )
    if not (found := compared(output)):
        given = ", ".join(str(tensor.dtype) for tensor in tensors_of(output)) or type(output).__name__
        raise ValueError(f"{CALLER}: the {role}, a {type(model).__name__}, returns no real float tensor to imitate, got {given}.")
    return found


@torch.no_grad()
def _refuse_random(model: nn.Module, example: Example, outputs: Mapping[str, Tensor], role: str) -> None:
    """The ``outputs`` were made with a random state of their own."""
    again = compared(example.run(model))
    moved = float(output_loss(again, outputs, scores=())) if _shapes(again) == _shapes(outputs) else math.inf
    if moved > max(torch.finfo(tensor.dtype).eps for tensor in outputs.values()):
        raise ValueError(
            f"{CALLER}: the {role}, a {type(model).__name__}, answers differently when it is asked twice, by {math.sqrt(moved):.2g} of its "
            "outputs' size, and that cannot be imitated. Have eval() turn off what is random in it, such as dropout."
        )


def _shapes(outputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in outputs.items())
