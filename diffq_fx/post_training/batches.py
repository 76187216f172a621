"""Unlabelled batches: read, checked to be inputs of one structure, and divided into those to tune on and those held out."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.errors import PreparationError
from diffq_fx.example import Example
from diffq_fx.training.output_loss import compared

CALLER = "compress"
_MOST_BATCHES = 1024
_MOST_BYTES = 1 << 30
"""An iterable may have no end: so many batches are kept, and so many bytes of them."""
_HELD_OUT = 8
"""One batch of so many is held out, and no more than this many batches."""
_MOST_CHARACTERS = 100
_LABELS = ("labels", "label", "target", "targets")
_EXAMPLE_ROWS, _EXAMPLE_TOKENS = 2, 32
_TOKEN_DIMS = 2
"""A mask of more is added to scores of attention, and may hide nothing."""


class Calibration:
    """The batches, on the model's device, and what is done with them.

    Attributes:
        tuned_on: examples that sensitivity, statistics and tuning see, at least one.
        held_out: examples that tell whether tuning helps; the same as ``tuned_on`` where there is one batch alone.
    """

    def __init__(self, batches: Any, device: torch.device) -> None:
        examples = [example.map(lambda tensor: tensor.detach().to(device)) for example in _read(batches)]
        held_out = min(_HELD_OUT, len(examples) // _HELD_OUT or int(len(examples) > 1))
        self.tuned_on = examples[: len(examples) - held_out]
        self.held_out = examples[len(examples) - held_out :] if held_out else self.tuned_on

    def cycle(self) -> Iterator[Example]:
        """The examples to tune on, again and again."""
        while True:
            yield from self.tuned_on

    def large(self) -> list[Example]:
        """The examples to tune on whose first dimension is more than half of the largest: in a plain mean over batches all count alike."""
        rows = [max((tensor.shape[0] for tensor in example.tensors if tensor.ndim), default=1) for example in self.tuned_on]
        return [example for example, count in zip(self.tuned_on, rows, strict=True) if 2 * count > max(rows)]

    def small_example(self, model: nn.Module) -> Example:
        """A part of the first batch, where the model runs on it: two rows, and of tokens the first ones. A whole batch takes long."""
        whole, shapes = self.tuned_on[0], [tensor.shape for tensor in self.tuned_on[0].tensors]
        if any(not shape or shape[0] != shapes[0][0] for shape in shapes):
            return whole
        are_tokens = all(tensor.ndim == 2 and not tensor.is_floating_point() for tensor in whole.tensors) and len(set(shapes)) == 1
        part = (slice(_EXAMPLE_ROWS), slice(_EXAMPLE_TOKENS)) if are_tokens else (slice(_EXAMPLE_ROWS),)
        small = whole.map(lambda tensor: tensor[part])
        try:
            small.outcome(model, "eval without grad")
        except Exception:  # noqa: BLE001  the user's forward may raise anything: then this is not what it takes
            return whole
        return small


def _read(batches: Any) -> list[Example]:
    """The batches as examples.

    Raises:
        TypeError: it is one batch, not several, or nothing to iterate over.
        ValueError: there is no batch, or they differ in structure.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes | nn.Module) or not isinstance(batches, Iterable):
        raise TypeError(f"{CALLER}: batches must be an iterable of inputs, got one {type(batches).__name__}: give [batch] or a DataLoader.")
    examples: list[Example] = []
    size = 0
    for number, batch in enumerate(batches):
        try:
            example = Example.of(batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{CALLER}: batch {number}: {error}") from error
        if not example.tensors and (example.args or example.kwargs):
            raise TypeError(f"{CALLER}: batch {number} holds no torch.Tensor ({str(example)[:_MOST_CHARACTERS]}). Give tensors.")
        if any(tensor.ndim and not tensor.shape[0] for tensor in example.tensors) or not example.tensors:
            raise ValueError(f"{CALLER}: batch {number} is empty ({example}). Leave it out.")
        mask = example.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() <= _TOKEN_DIMS and not mask.any():
            raise ValueError(f"{CALLER}: the attention_mask of batch {number} is 0 everywhere: none of its tokens counts. Leave it out.")
        if examples and (was := _structure(examples[0])) != (found := _structure(example)):
            raise ValueError(f"{CALLER}: batch {number} has another structure than batch 0: expected {was}, got {found}.")
        examples.append(example)
        size += sum(tensor.nbytes for tensor in example.tensors)
        if len(examples) == _MOST_BATCHES or size > _MOST_BYTES:
            break
    if not examples:
        raise ValueError(f"{CALLER}: there is no batch. Give an iterable of inputs, such as a few batches of the training set.")
    return examples


def _structure(example: Example) -> str:
    """Names, types and numbers of dimensions: sizes may change from batch to batch."""

    def described(value: Any) -> str:
        return f"{value.dtype} of {value.ndim} dimensions" if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([described(value) for value in example.args] + [f"{k}={described(v)}" for k, v in sorted(example.kwargs.items())])


def refuse_labels(model: nn.Module, example: Example) -> None:
    """Refuse what a model does not need: further positional inputs that it does not take, and what is named as labels are.

    Raises:
        ValueError: the model runs without it, and with it not at all; or, of what is named so, has the same outputs.
    """
    for name in set(_LABELS) & example.kwargs.keys():
        without = _outputs(model, Example(example.args, {other: value for other, value in example.kwargs.items() if other != name}))
        found = _outputs(model, example)
        if without and (not found or all(torch.equal(each, without[key]) for key, each in found.items() if key in without)):
            raise ValueError(f"{CALLER}: the batches hold {name!r}, and no labels are wanted: give the model's inputs alone.")
    if len(example.args) > 1 and not _outputs(model, example) and _outputs(model, Example(example.args[:1], example.kwargs)):
        raise ValueError(
            f"{CALLER}: the model takes 1 input and the batches hold {len(example.args)}, labels among them, it seems: "
            "give the model's inputs alone, such as (x for x, y in loader)."
        )


def _outputs(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """The outputs to compare; none where the model does not run on the example."""
    try:
        return compared(example.outcome(model, "eval without grad")[0])
    except Exception:  # noqa: BLE001  the user's forward may raise anything: then these are not its inputs
        return {}


def refuse_too_little_memory(needed: int, device: torch.device) -> None:
    """Refuse to begin what cannot end.

    Raises:
        PreparationError: says how much is needed and how much is free.
    """
    free = _free_bytes(device)
    if free is not None and needed > free:
        raise PreparationError(
            f"{CALLER}: about {needed / 2**30:.2f} GiB of memory are needed beside the model and {free / 2**30:.2f} are free on {device}. "
            "Free some, or leave large weights in float with exclude."
        )


def _free_bytes(device: torch.device) -> int | None:
    """Memory that may be taken, None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
