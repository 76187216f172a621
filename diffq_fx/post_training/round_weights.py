"""Ranges by the error of the output, and rounding with error compensation, in the order of the weights in the model."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffq_fx.budget.coded_levels import PRICE, CodedLevels
from diffq_fx.budget.entropy import RoundedWeight
from diffq_fx.compression import Compression
from diffq_fx.example import Example
from diffq_fx.functional.groups import from_rows
from diffq_fx.methods.diffq import DiffQWeight
from diffq_fx.post_training.batches import Calibration
from diffq_fx.post_training.best import Best
from diffq_fx.post_training.compensation import compensate, shrunk
from diffq_fx.post_training.limits import Limits
from diffq_fx.post_training.moments import MOST_COLUMNS, Moments, float_weights, second_moments
from diffq_fx.post_training.progress import ProgressBar
from diffq_fx.training.phases import coded_excess, stretch_ranges

_T = TypeVar("_T")
_RANGE_BATCHES = 8
"""Batches that the diagonals of second moments are gathered from, which ranges need."""
_MOMENT_BATCHES, _LEAST_BATCHES, _MOMENT_SHARE = 16, 4, 0.2
"""Batches that whole matrices are gathered from: at most, at least, and the part of the time that this may take."""
_MOMENT_BYTES = 1 << 28
"""Of the matrices that are in memory at once."""
_PARTS = 4
"""The inputs of a weight are those after all weights of earlier parts are rounded."""
_FITS, _ROUNDINGS, _ROUNDING_SHARE = 4, 3, 0.5
"""How often ranges are scaled until the code takes the target: that of levels chosen one by one, and, within a part of the time, that of
compensated ones, which are found anew each time."""
_IN_THE_CELL = 0.45
"""Steps that a weight may keep between itself and its level: tuning goes on from there."""


@torch.no_grad()
def round_weights(
    model: nn.Module, compression: Compression, data: Calibration, limits: Limits, bar: ProgressBar, best: Best
) -> tuple[str, ...]:
    """Find the ranges, make widths and ranges final and round all weights; afterwards each weight lies in the cell of its level.

    A weight whose inputs are not known, or whose moments cannot be used, is rounded to the nearest levels; all are, where the outputs of
    the held-out batches then agree better, and with the bits that they had before, where ``best`` is of those and still is the best.

    Returns:
        A sentence for each reason, with the weights' names.
    """
    parts, range_batches = list(_in_parts(compression.learned)), data.tuned_on[:_RANGE_BATCHES]
    bar.stage("ranges", 1)
    began = limits.share
    with float_weights(compression.quantizers):
        moments = second_moments(model, range_batches, compression.learned, most_columns=0)
    each = len(parts) * (limits.share - began) / len(range_batches)
    batches = data.tuned_on[: limits.times(_MOMENT_SHARE, each, _LEAST_BATCHES, _MOMENT_BATCHES)]
    for quantizer in compression.learned:
        importance = moments[quantizer.spec.name].importance
        if quantizer.importance is not None and importance is not None:
            quantizer.importance.copy_(importance)
    compression.price = PRICE if compression.is_coded else 0.0
    compression.freeze()
    price, compression.price = compression.price, 0.0
    floats, found = [quantizer.weight.detach().clone() for quantizer in compression.learned], list[float]()

    def fit(rounded: Callable[[], _T], rounds: int) -> _T:
        """Round the weights, and again with longer or shorter steps while the code does not take the target; the best state is kept."""
        while True:
            for quantizer, value in zip(compression.learned, floats, strict=True):
                quantizer.weight.copy_(value)
            result, rounds, excess = rounded(), rounds - 1, coded_excess(compression)
            last = not excess or not rounds or limits.share > _ROUNDING_SHARE
            if excess <= 0 or (last and not found):
                best.look()
                found.append(best.latest)
            if last:
                return result
            stretch_ranges(compression, excess)

    fit(lambda: _nearest(compression.learned, price), _FITS)
    plain, looks = min(found), len(found)
    left = fit(lambda: _compensate(model, parts, batches, price, bar), _ROUNDINGS)
    steps = compression.known.steps
    best.restore()
    if not compression.frozen:  # the state before the bits moved
        compression.freeze()
        compression.note(steps=steps, frozen_at=steps)
        compression.uniform_bits.fill_(1)
        left, plain, looks, best.distance = {}, best.distance, len(found), math.inf
        best.look()
    compression.note(rest_bits=compression.rest_bits_now())
    failed = [f"rounded to the nearest levels ({reason}): {', '.join(names)}" for reason, names in left.items()]
    if not min(found[looks:], default=plain) < plain:
        failed.append(f"rounded to the nearest levels (error compensation brings the outputs no nearer than {plain:.4g}): all weights")
    return tuple(failed)


def _nearest(quantizers: Sequence[DiffQWeight], price: float) -> None:
    """Round to the nearest levels, which the quantizers do by themselves, or to those with a short code as well."""
    for quantizer in quantizers if price else ():
        weight = quantizer.rounded_at(quantizer.rounded_bits())
        _move(quantizer, weight, CodedLevels(weight, price).cheapest(weight).rows)


def _compensate(
    model: nn.Module, parts: Sequence[Sequence[DiffQWeight]], batches: Sequence[Example], price: float, bar: ProgressBar
) -> dict[str, list[str]]:
    """Round all weights; why some without compensation, and their names."""
    bar.stage("rounding", sum(map(len, parts)))
    left: dict[str, list[str]] = {}
    for part in parts:
        moments = second_moments(model, batches, part)
        for quantizer in part:
            weight = quantizer.rounded_at(quantizer.rounded_bits())
            code = CodedLevels(weight, price) if price else None
            kept_OI = weight.spec.range_layout.at_ends(weight.rows) if quantizer.clip is None else None
            try:
                _move(quantizer, weight, _compensated(weight, moments.pop(quantizer.spec.name), code, kept_OI))
            except ValueError as error:
                left.setdefault(str(error), []).append(quantizer.spec.name)
                if code is not None:
                    _move(quantizer, weight, code.cheapest(weight).rows)
            bar.advance()
    return left


def _move(quantizer: DiffQWeight, weight: RoundedWeight, rounded_OI: Tensor) -> None:
    """Put a weight into the cells of these levels."""
    spec, rows_OI = weight.spec, weight.rows.float()
    cell_OI = spec.scale_layout.expand(weight.params.scale) * _IN_THE_CELL
    within_OI = rounded_OI + torch.clamp(rows_OI - rounded_OI, -cell_OI, cell_OI)
    if quantizer.clip is None:  # the range follows the weights: its ends stay, and no weight goes beyond
        low_OI, high_OI = map(spec.range_layout.expand, spec.range_layout.aminmax(rows_OI))
        within_OI = torch.where(spec.range_layout.at_ends(rows_OI), rows_OI, within_OI.clamp(low_OI, high_OI))
    quantizer.weight.copy_(from_rows(within_OI, spec.shape, spec.axis))


def _compensated(weight: RoundedWeight, moments: Moments, code: CodedLevels | None, kept_OI: Tensor | None) -> Tensor:
    if moments.matrix is None:
        raise ValueError(moments.reason or f"rows of more than {MOST_COLUMNS} weights")
    with torch.autocast(weight.rows.device.type, enabled=False):
        matrices = shrunk(moments.matrix, moments.count)
        return compensate(weight.rows, matrices, weight.params, weight.width, weight.spec.scale_layout, code=code, kept_OI=kept_OI)


def _in_parts(quantizers: Sequence[DiffQWeight]) -> Iterator[list[DiffQWeight]]:
    """Neighbouring weights, as many as have their matrices in memory together."""
    sizes = [4 * min(quantizer.spec.columns, MOST_COLUMNS) ** 2 for quantizer in quantizers]
    most, part, size = min(_MOMENT_BYTES, sum(sizes) / _PARTS), [], 0
    for quantizer, own in zip(quantizers, sizes, strict=True):
        if part and size + own > most:
            yield part
            part, size = [], 0
        part.append(quantizer)
        size += own
    yield part
