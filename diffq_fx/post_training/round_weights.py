"""Ranges by the error of the output, and rounding with error compensation, in the order of the weights in the model."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from diffq_fx.budget.coded_levels import PRICE, CodedLevels
from diffq_fx.budget.entropy import RoundedWeight
from diffq_fx.compression import Compression
from diffq_fx.functional.groups import from_rows, to_rows
from diffq_fx.methods.diffq import DiffQWeight
from diffq_fx.post_training.batches import Calibration
from diffq_fx.post_training.compensation import compensate, shrunk
from diffq_fx.post_training.limits import Limits
from diffq_fx.post_training.moments import MOST_COLUMNS, Moments, float_weights, second_moments
from diffq_fx.post_training.progress import ProgressBar
from diffq_fx.training.phases import hold_coded_size

_RANGE_BATCHES = 8
"""Batches that the diagonals of second moments are gathered from, which ranges need."""
_MOMENT_BATCHES, _LEAST_BATCHES, _MOMENT_SHARE = 16, 4, 0.2
"""Batches that whole matrices are gathered from: at most, at least, and the part of the time that this may take."""
_MOMENT_BYTES = 1 << 28
"""Of the matrices that are in memory at once."""
_PARTS = 4
"""The inputs of a weight are those after all weights of earlier parts are rounded."""
_IN_THE_CELL = 0.45
"""Steps that a weight may keep between itself and its level: tuning goes on from there."""


@torch.no_grad()
def round_weights(model: nn.Module, compression: Compression, data: Calibration, limits: Limits, bar: ProgressBar) -> tuple[str, ...]:
    """Find the ranges, make widths and ranges final and round all weights; afterwards each weight lies in the cell of its level.

    A weight whose inputs are not known, or whose moments cannot be used, is rounded to the nearest levels.

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
    bar.stage("rounding", len(compression.learned))
    left: dict[str, list[str]] = {}
    for part in parts:
        moments = second_moments(model, batches, part)
        for quantizer in part:
            if reason := _round(quantizer, moments.pop(quantizer.spec.name), compression.price):
                left.setdefault(reason, []).append(quantizer.spec.name)
            bar.advance()
    compression.price = 0.0
    hold_coded_size(compression)
    return tuple(f"rounded to the nearest levels ({reason}): {', '.join(names)}" for reason, names in left.items())


def _round(quantizer: DiffQWeight, moments: Moments, price: float) -> str:
    """Round one weight; why without compensation, if it is."""
    spec, bits = quantizer.spec, quantizer.rounded_bits()
    rows_OI = to_rows(quantizer.weight.detach(), spec.axis).float()
    weight = RoundedWeight(spec, rows_OI, bits, quantizer.params(rows_OI, bits))
    code = CodedLevels(weight, price) if price else None
    try:
        rounded_OI, reason = _compensated(weight, moments, code), ""
    except ValueError as error:
        reason = str(error)
        if code is None:
            return reason
        rounded_OI = code.cheapest(weight).rows
    cell_OI = spec.scale_layout.expand(weight.params.scale) * _IN_THE_CELL
    within_OI = rounded_OI + torch.clamp(rows_OI - rounded_OI, -cell_OI, cell_OI)
    if quantizer.clip is None:  # the range follows the weights: its ends stay, and no weight goes beyond
        low_OI, high_OI = (spec.range_layout.expand(end) for end in spec.range_layout.aminmax(rows_OI))
        within_OI = torch.where((rows_OI == low_OI) | (rows_OI == high_OI), rows_OI, within_OI.clamp(low_OI, high_OI))
    quantizer.weight.copy_(from_rows(within_OI, spec.shape, spec.axis))
    return reason


def _compensated(weight: RoundedWeight, moments: Moments, code: CodedLevels | None) -> Tensor:
    if moments.matrix is None:
        raise ValueError(moments.reason or f"rows of more than {MOST_COLUMNS} weights")
    with torch.autocast(weight.rows.device.type, enabled=False):
        matrices = shrunk(moments.matrix, moments.count)
        return compensate(weight.rows, matrices, weight.params, weight.width, weight.spec.scale_layout, code=code)


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
