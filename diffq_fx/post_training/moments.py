"""Second moments of what each weight is multiplied with: what its rounding error does to the output of its layer.

A layer ``y = W x`` whose rows are rounded to Q is off by ``||(W - Q) x||^2``; its mean over inputs is the sum over rows of
``e H e^T`` with ``e`` the error of a row and ``H = E[x x^T]`` (OBS, Hassibi & Stork, 1993; GPTQ, arXiv:2210.17323).

Shape legend: O rows (output channels), I columns, G parts of the rows that have inputs of their own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.capture.uses import Given, WeightProduct, WeightUses, operators_in_parts
from diffq_fx.example import Example, in_eval
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.weights import WeightSpec, not_finite

MOST_COLUMNS = 16384
"""Weights with longer rows have the diagonal alone: a whole matrix of 16384 columns takes 1 GiB."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What one weight is multiplied with, on average over all its uses in all batches; float32.

    Where nothing is known, both are None and ``reason`` says why.
    """

    matrix: Tensor | None = None
    """``E[x x^T]``, shape (G, I, I), columns in the order of the weight's rows; row o belongs to part ``o // (O / G)``."""
    diagonal: Tensor | None = None
    """``E[x^2]``, shape (G, I); there wherever ``matrix`` is, and alone where rows are too long for it."""
    count: float = 0.0
    """Inputs that the means of the columns are over."""
    reason: str = ""
    """What else reads the weight, or why nothing is known."""

    @property
    def importance(self) -> Tensor | None:
        """Mean square of what each column is multiplied with, shape (I,); None where it is not known."""
        return None if self.diagonal is None else self.diagonal.mean(0)


@dataclass
class _Sums:
    """What is gathered of one weight."""

    spec: WeightSpec
    whole: bool
    parts: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Sums over products with rows from a first one on, by (first row, rows): shape (I, I), or (I,) of the diagonal."""
    count: float = 0.0
    is_looked_up: bool = False
    others: dict[str, None] = field(default_factory=dict)

    def add(self, product: WeightProduct, sums: Tensor, count: int) -> None:
        """Add ``sums`` over ``count`` inputs, shape (K, K) or (K,), to the rows and columns of a product."""
        first_row, rows, columns, *_ = product
        size = self.spec.columns
        part = self.parts.setdefault((first_row, rows), sums.new_zeros((size, size) if self.whole else (size,)))
        if columns is None:
            part += sums
        else:
            part.index_put_((columns[:, None], columns[None]) if self.whole else (columns,), sums, accumulate=True)
        self.count += count * rows / self.spec.rows * len(sums) / size  # of a weight used in parts, each part is one part of a use

    def matrices(self) -> Tensor | None:
        """Means by parts of equally many rows, shape (G, I, I) or (G, I)."""
        if not self.parts or not self.count:
            return None
        edges = {edge for first, rows in self.parts for edge in (first, first + rows)} | {0, self.spec.rows}
        height = next(size for size in range(self.spec.rows, 0, -1) if not any(edge % size for edge in edges))
        if height == self.spec.rows:
            return torch.stack(list(self.parts.values())).sum(0, keepdim=True) / self.count
        means = next(iter(self.parts.values())).new_zeros(self.spec.rows // height, *next(iter(self.parts.values())).shape)
        for (first, rows), part in self.parts.items():
            means[first // height : (first + rows) // height] += part / self.count
        return means

    def moments(self) -> Moments:
        """The means."""
        means = self.matrices()
        reason = f"read by {', '.join(self.others)}" if self.others else ""
        if means is None:
            return Moments(reason=reason or ("rows are looked up" if self.is_looked_up else "no batch reads it"))
        if where := not_finite(means):
            raise ValueError(f"second_moments: what weight {self.spec.name!r} is multiplied with {where}. Look for NaN in the batches.")
        diagonal = means.diagonal(dim1=-2, dim2=-1).contiguous() if self.whole else means
        return Moments(means if self.whole else None, diagonal, self.count, reason)


class _Gather:
    """Sums over what :class:`WeightUses` finds."""

    def __init__(self, specs: Iterable[WeightSpec], most_columns: int) -> None:
        self.sums = {spec.name: _Sums(spec, whole=spec.columns <= most_columns) for spec in specs}
        self._last: tuple[Any, Tensor, Tensor, int] | None = None

    def product(self, name: str, product: WeightProduct) -> None:
        """Add the outer products of the inputs."""
        sums = self.sums[name]
        if product.along_rows:
            sums.is_looked_up = True
        else:
            sums.add(product, *self._of_inputs(product, sums.whole))

    def _of_inputs(self, product: WeightProduct, whole: bool) -> tuple[Tensor, int]:
        """Sum of ``x x^T`` or of ``x^2`` over the inputs, and their number; made once where neighbours share inputs, as q, k and v do."""
        same = product.same_inputs
        if product.one_hot is not None:
            counts = torch.bincount(product.one_hot, minlength=product.width).float()
            return torch.diag(counts) if whole else counts, len(product.one_hot)
        if same is not None and self._last is not None and self._last[0] == (*same, whole):
            return self._last[2:]
        total, count = torch.zeros(()), 0
        for piece in product.inputs():
            inputs = piece.float()
            total = total.to(inputs.device) + (inputs.mT @ inputs if whole else inputs.square().sum(0))
            count += len(inputs)
        if same is not None and product.key is not None:
            self._last = (*same, whole), product.key, total, count  # the key is kept, so that no other tensor gets its address
        return total, count

    def other(self, name: str, operator: str) -> None:
        self.sums[name].others[operator] = None


def second_moments(
    model: nn.Module, batches: Iterable[Any], quantizers: Sequence[WeightQuantizer], *, most_columns: int = MOST_COLUMNS
) -> dict[str, Moments]:
    """Gather ``E[x x^T]`` of what weights are multiplied with, over all their uses in all batches.

    The model runs in eval() without gradients, with its quantizers as they are: those before a weight round what it is multiplied with
    (see :func:`float_weights` for the float model's). Modes, random state and quantizers are left as they were.

    Args:
        model: a prepared model.
        batches: what the model is called with, one call each: a tensor, a tuple of positional or a dict of keyword arguments.
        quantizers: those of the weights to look at. The matrices of all of them are in memory at once: give some at a time.
        most_columns: weights with longer rows have the diagonal alone.

    Returns:
        By the weight's name in the order of ``quantizers``.

    Raises:
        ValueError: there is no batch, or what a weight is multiplied with is not finite.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import STE
        >>> prepared = prepare(nn.Linear(2, 64), torch.zeros(1, 2), STE(bits=4))
        >>> second_moments(prepared, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])], prepared.compression.quantizers)["weight"].matrix
        tensor([[[0.5000, 0.0000],
                 [0.0000, 2.0000]]])
    """
    gather = _Gather((quantizer.spec for quantizer in quantizers), most_columns)
    runs = 0
    with torch.no_grad(), in_eval(model), operators_in_parts(model), _known_weights(quantizers) as given:
        uses = WeightUses(given, gather.product, gather.other)
        for batch in batches:
            example = Example.of(batch)
            with uses:
                example.run(model)
            uses.forget_copies()
            runs += 1
    if not runs:
        raise ValueError("second_moments: there is no batch. Give some that the model is called with.")
    return {name: sums.moments() for name, sums in gather.sums.items()}


def float_weights(quantizers: Sequence[WeightQuantizer]) -> AbstractContextManager[None]:
    """Have these quantizers give out the weight as it is.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import STE
        >>> prepared = prepare(nn.Linear(4, 64), torch.zeros(1, 4), STE(bits=4)).eval()
        >>> with float_weights(prepared.compression.quantizers):
        ...     output = prepared(torch.ones(1, 4))
        >>> torch.equal(output, nn.functional.linear(torch.ones(1, 4), prepared.weight, prepared.bias))
        True
    """
    return _giving([(quantizer, quantizer.weight.detach()) for quantizer in quantizers])


@contextmanager
def _giving(pairs: Sequence[tuple[WeightQuantizer, Tensor]]) -> Iterator[None]:
    before = [quantizer._stand_in for quantizer, _ in pairs]
    try:
        for quantizer, tensor in pairs:
            quantizer.pass_through(lambda tensor=tensor: tensor)
        yield
    finally:
        for (quantizer, _), stand_in in zip(pairs, before, strict=True):
            quantizer.pass_through(stand_in)


@contextmanager
def _known_weights(quantizers: Sequence[WeightQuantizer]) -> Iterator[list[Given]]:
    """What each quantizer gives out, alone in its storage and in one row, so that its address and strides say where a view of it is."""
    given = []
    for quantizer in quantizers:
        weight = quantizer(quantizer.weight).detach()
        if not weight.is_contiguous() or weight.untyped_storage().nbytes() != weight.nbytes:
            weight = weight.clone(memory_format=torch.contiguous_format)
        given.append(Given(quantizer.spec, weight))
    with _giving([(quantizer, each.tensor) for quantizer, each in zip(quantizers, given, strict=True)]):
        yield given
