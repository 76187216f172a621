"""Example inputs as an export uses them: read in every form, repeated along the batch, drawn anew, with what their masks hide."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.example import Example, tensors_of
from diffq_fx.threads import silent_stderr

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError)
"""What a model, or its trace, raises at inputs that it does not take."""
_SEQUENCE_SIZES = 3
"""Batch, length and features."""
CACHE, ATTENTION_MASK = "past_key_values", "attention_mask"
"""What decoders call their cache, and the mask over what is cached and what is new."""
_HIDES = -1e4
"""What is added to a score of attention to hide it lies below this."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """What one value of one mask hides, if it is the value that hides."""

    number: int
    """Of the mask among the inputs."""
    shows: float
    """The mask's other value."""
    places: np.ndarray
    """Of shape (batch, length)."""
    rows: np.ndarray
    """Of shape (batch,): where attention sees nothing."""

    def without(self, output: np.ndarray) -> np.ndarray:
        """An output of shape (batch, length, ...) without the places that are hidden, any other of the batch without those rows."""
        if output.shape[:2] == self.places.shape:
            return output if self.places.all() else output[~self.places]
        return output[~self.rows] if output.shape[:1] == self.rows.shape and not self.rows.all() else output

    def shown(self, example: "ExportExample") -> "ExportExample":
        """The example with rows that see everything instead of nothing."""
        tensors = [tensor.clone() for tensor in example.tensors]
        tensors[self.number][torch.from_numpy(self.rows)] = self.shows
        return example.replace(tensors)


class ExportExample(Example):
    """The example of a call as an export uses it."""

    @property
    def hidden(self) -> list[Hidden]:
        """What each mask of shape (batch, length) or (batch, ..., queries, keys) hides, by either of its values."""
        found = []
        for number, tensor in enumerate(self.tensors):
            if tensor.dim() < 2 or not tensor.numel() or not _is_mask(tensor):
                continue
            values = tensor.detach().double().cpu().numpy()
            is_added = values.min() < _HIDES
            for hides, shows in ((values.min(), 0.0),) if is_added else ((0, 1.0), (1, 0.0)):
                places = values == hides
                rows = places.all(1)
                if values.ndim > 2:  # queries that see no key, in whatever head
                    places = places.all(-1).reshape(len(values), -1, values.shape[-2]).any(1)
                    rows = places.any(1)
                found.append(Hidden(number, shows, places, rows))
        return found

    def run(self, model: nn.Module) -> list[Any]:
        """The leaves of the output, without gradients. A graph of torch.fx prints what it raises, to nobody here."""
        with torch.no_grad(), silent_stderr():
            return _compat.tree_leaves(super().run(model))

    def on_its_own(self) -> "ExportExample":
        """Tensors that share nothing.

        torch.export guards the sizes of the tensor that a view is of, and makes one input of a tensor that is given twice.
        """
        return self.map(lambda tensor: tensor.detach().clone())

    def replace(self, tensors: list[Tensor]) -> "ExportExample":
        """Replace all tensors, in their order."""
        remaining = iter(tensors)
        return self.map(lambda _: next(remaining))

    def repeated(self) -> "ExportExample | None":
        """The example with every batch of one repeated to two, since torch.export bakes in a size of one; None without any."""
        if not any(tensor.dim() and tensor.shape[0] == 1 for tensor in self.tensors):
            return None
        return self.map(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor)

    @property
    def cached(self) -> list[Tensor]:
        """The keys and values that a decoder is given."""
        return tensors_of(self.kwargs.get(CACHE))

    def dynamic_axes(self, tensor: Tensor, *, lengths: bool) -> range:
        """Axes that shall be dynamic where the model allows it: the batch, and all others but the heights and widths of images.

        No image is what has less than four sizes, is integer, a mask, or cached.
        """
        is_image = tensor.dim() > _SEQUENCE_SIZES and tensor.is_floating_point() and not _is_mask(tensor)
        is_image = is_image and not any(tensor is each for each in self.cached)
        return range(tensor.dim() if lengths and not is_image else min(tensor.dim(), 1))

    @property
    def has_lengths(self) -> bool:
        """Whether any axis but the batch shall be dynamic."""
        return any(len(self.dynamic_axes(tensor, lengths=True)) > 1 for tensor in self.tensors)

    def dynamic_sizes(self, *, lengths: bool) -> torch.export.ShapesCollection:
        """The axes above, as torch.export's ``dynamic_shapes``."""
        shapes = torch.export.ShapesCollection()
        for tensor in self.tensors:
            if axes := [axis for axis in self.dynamic_axes(tensor, lengths=lengths) if tensor.shape[axis] != 1]:
                shapes[tensor] = dict.fromkeys(axes, torch.export.Dim.AUTO)
        return shapes

    def resized(self, shapes: list[tuple[int, ...]]) -> "ExportExample":
        """The example cut off, or with its last values repeated, to these shapes."""
        return self.replace([_resized(tensor, shape) for tensor, shape in zip(self.tensors, shapes, strict=True)])

    def lengthened(self, shapes: list[tuple[int, ...]]) -> "ExportExample":
        """The example whose integers that are a size, as lengths of sequences are, follow that size."""
        pairs = [pair for tensor, shape in zip(self.tensors, shapes, strict=True) for pair in zip(tensor.shape, shape, strict=True)]
        changed = {old: new for old, new in pairs if old != new}
        return self.map(
            lambda t: t if t.is_floating_point() or _is_mask(t) else t.cpu().clone().apply_(lambda n: changed.get(n, n)).to(t.device)
        )

    def redrawn(
        self, generator: torch.Generator, shapes: list[tuple[int, ...]], keep: Callable[[Tensor], bool] = lambda _: False
    ) -> "ExportExample":
        """Fresh random inputs like these: floats and integers within the range of the example's, masks of the example's rows.

        Integers in ascending order (offsets, positions) keep their values, since their order means something. A decoder's mask hides
        nothing of what is new, which would see nothing if all before it were hidden too.

        Args:
            generator: the source of randomness, on the CPU.
            shapes: of each tensor.
            keep: which tensors keep their values, the last ones repeated where the shape is larger.
        """
        drawn = self.replace([_like(t, shape, generator, keep(t)) for t, shape in zip(self.tensors, shapes, strict=True)])
        if drawn.cached and ATTENTION_MASK in drawn.kwargs:
            drawn.kwargs[ATTENTION_MASK][:, max(drawn.cached[0].shape[2] - 1, 0) :] = 1
        return drawn


def _like(tensor: Tensor, shape: tuple[int, ...], generator: torch.Generator, keep: bool) -> Tensor:
    if tensor.numel() == 0:
        return tensor.new_zeros(shape)
    if keep or _is_ascending(tensor):
        return _resized(tensor, shape)
    if _is_mask(tensor):
        return _rows_like(tensor, shape, generator)
    if not tensor.is_floating_point():
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(tensor)
    values = tensor.detach().double().cpu()
    spread = float(values.std(correction=0))
    if not spread > 0:
        return torch.randn(shape, generator=generator).to(tensor)
    drawn = float(values.mean()) + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.clamp(float(values.min()), float(values.max())).to(tensor)


def _is_ascending(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.numel() > 1 and bool((tensor.diff() >= 0).all()) and bool(tensor[0] != tensor[-1])


def _is_mask(tensor: Tensor) -> bool:
    """Whether the values say what is seen: booleans, 0 and 1, or what is added to scores of attention and hides some of them."""
    if tensor.dtype == torch.bool:
        return True
    if not tensor.is_floating_point():
        return bool(((tensor == 0) | (tensor == 1)).all())
    values = tensor.detach().double()
    return bool(((values == 0) | (values == 1)).all() and (values != values.flatten()[0]).any()) or bool((values < _HIDES).any())


def _rows_like(mask: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows of the example's mask in random order: a row that was made at random may hide everything, or break what belongs together."""
    for axis, size in enumerate(shape[1:] if len(shape) > 1 else shape, 1 if len(shape) > 1 else 0):
        while mask.shape[axis] > size:
            mask = _without_one(mask, axis)
    if len(shape) > 1:
        order = torch.randperm(mask.shape[0], generator=generator)
        rows = mask.flatten(1).to(order.device)
        one_value = (rows == rows[:, :1]).all(1)
        order = order[one_value[order].sort(stable=True).indices]  # a row that sees nothing is left out first
        mask = mask[order[torch.arange(shape[0]) % len(order)].to(mask.device)]
    return _resized(mask, shape)


def _without_one(mask: Tensor, axis: int) -> Tensor:
    """The mask with one place less along an axis: the last one whose row keeps both what it shows and what it hides."""
    values = mask.detach().double()
    places = list(range(mask.shape[axis]))
    for place in reversed(places):
        rest = torch.tensor(places[:place] + places[place + 1 :], device=mask.device)
        less = values.index_select(axis, rest)
        if torch.equal(less.amin(axis), values.amin(axis)) and torch.equal(less.amax(axis), values.amax(axis)):
            return mask.index_select(axis, rest)
    return mask.narrow(axis, 0, mask.shape[axis] - 1)


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        places = torch.arange(size, device=tensor.device).clamp(max=tensor.shape[axis] - 1)
        tensor = tensor.index_select(axis, places)
    return tensor.clone()
