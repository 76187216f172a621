"""bits_report: read the bits of a prepared or a converted model."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from diffq_fx.budget.size import mib
from diffq_fx.compression import Compression
from diffq_fx.convert import CompressionRecord
from diffq_fx.errors import PreparationError
from diffq_fx.methods.base import Method, WeightQuantizer
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.parts import CHILD, parameters_outside, parts_of, unwrapped
from diffq_fx.report.numbers import WeightBits
from diffq_fx.report.views import BitsReport
from diffq_fx.storage import StoredWeight
from diffq_fx.storage.packing import narrowed, tables_once
from diffq_fx.training.steps import NOT_TRAINED
from diffq_fx.weights import SkippedWeight

_FLOAT_BITS = 32


def bits_report(model: nn.Module) -> BitsReport:
    """Report the bits of every quantized weight, the sizes of the model, and what was left in float and why.

    Args:
        model: from ``prepare_diffq`` (trained or not) or ``convert_diffq``, or a module that holds several of them: then all of it.
            Its widths are those that eval() and convert use, and a converted model has the report of the prepared one it came from.

    Returns:
        The report. ``print`` it, ``rich.print`` it, or see its ``as_dict``, ``figure`` and ``save_picture``.

    Raises:
        PreparationError: the model is neither prepared nor converted.

    Example:
        >>> import torch
        >>> from diffq_fx import DiffQConfig, bits_report, prepare_diffq
        >>> prepared = prepare_diffq(torch.nn.Linear(64, 64), torch.zeros(1, 64), DiffQConfig(target_bits=None))
        >>> report = bits_report(prepared)
        >>> report.weights[0].histogram
        {6: 4096}
        >>> report.average_bits, report.average_bits_in_all  # scale: 32 bits, zero point: 7 bits for 64 weights; 8 bits a weight tensor
        (6.0, 6.611328125)
    """
    model = unwrapped(model)
    parts = parts_of(model, (Compression, CompressionRecord))
    if parts:
        reports = {path: _of_part(part) for path, part in parts.items()}
        return reports[""] if "" in reports else _joined(model, reports, parameters_outside(model, parts))
    found = type(model).__name__
    if any(isinstance(module, StoredWeight) for module in model.modules()):
        raise PreparationError(
            f"bits_report: the {found} is a part of a converted model. Give the whole model that convert_diffq returned."
        )
    raise PreparationError(
        f"bits_report: the {found} is neither prepared nor converted. Call prepare_diffq(model, example_inputs) first and give its result."
    )


def _of_part(root: nn.Module) -> BitsReport:
    """The report of a prepared or converted model; the order of the weights is the same before and after conversion."""
    record: Compression | CompressionRecord = vars(root)[CHILD]
    notes = record.notes
    if isinstance(record, Compression) and record.learned:
        record.allocate()
        notes += (NOT_TRAINED,) * (not int(record.steps))
    if record.in_noise:
        notes += (f"in the noise phase after step {int(record.steps)}: the bits are not final, no weight has trained with true rounding",)
    if any(method.layout[2] == "float" for method in record.method.methods):
        notes += ("ONNX has no form for the float grid: the container size is what memory takes",)
    kind = WeightQuantizer if isinstance(record, Compression) else StoredWeight
    sensitivity = record.sensitivity
    weights = {child: _row(child, sensitivity) for module in root.modules() for child in module.children() if isinstance(child, kind)}
    learned = next((method for method in record.method.methods if isinstance(method, DiffQConfig)), None)
    penalty = learned.penalty if learned else None
    worth = record.lambda_per_bit if penalty is None else penalty * mib(1)
    dtypes = {name: parameter.dtype for name, parameter in root.named_parameters(remove_duplicate=False)}
    return BitsReport(
        model=type(root).__name__,
        stage="prepared" if isinstance(record, Compression) else "converted",
        method=record.method.name,
        scope=record.scope,
        scope_reason=record.scope_reason or "the default, and faithful for this model" * (record.scope == "model"),
        weights=tuple(weights.values()),
        skipped=tuple(record.skipped),
        rest_bits=record.rest_numel * record.method.rest_width,
        rest_float_bits=sum(math.prod(each.shape) * 8 * dtypes.get(each.name, torch.float32).itemsize for each in record.skipped),
        buffer_bits=_buffer_bits(root),
        target_bits=learned.target_bits if learned else None,
        target_mib=learned.target_mib if learned else None,
        penalty=penalty,
        lambda_per_bit=None if worth is None else float(worth),
        settings=tuple(_settings(*entry) for entry in record.method.entries),
        allocation=record.allocation,
        notes=notes,
        curves=record.curves,
    )


def _settings(pattern: str, method: Method) -> str:
    """A method as one would write it, without what is the default."""
    changed = [f"{f.name}={value!r}" for f in fields(method) if (value := getattr(method, f.name)) != f.default]
    return f"{pattern}: " * (pattern != "*") + f"{type(method).__name__}({', '.join(changed)})"


def _row(weight: WeightQuantizer | StoredWeight, sensitivity: Mapping[str, float]) -> WeightBits:
    spec = weight.spec
    float_bits = spec.numel * 8 * spec.dtype.itemsize
    named = {"name": spec.name, "aliases": spec.aliases, "shape": spec.shape, "consumer": spec.consumer, "float_bits": float_bits}
    return WeightBits(**named, sensitivity=sensitivity.get(spec.name), **vars(weight.footprint()))


def _joined(model: nn.Module, reports: dict[str, BitsReport], outside: dict[str, nn.Parameter]) -> BitsReport:
    """One report of several parts and of what the model has beside them, under the names of the whole."""

    def one_of(name: str) -> Any:
        """What all parts say, if they say the same."""
        values = list(dict.fromkeys(getattr(report, name) for report in reports.values()))
        return values[0] if len(values) == 1 else " + ".join(values) if all(isinstance(value, str) for value in values) else None

    def of_all(name: str) -> list[tuple[str, Any]]:
        """What all parts have, each with the path of its part."""
        return [(path, each) for path, report in reports.items() for each in getattr(report, name)]

    own = [SkippedWeight(name, tuple(parameter.shape), "in no prepared part") for name, parameter in outside.items()]
    moved = [replace(skipped, name=f"{path}.{skipped.name}") for path, skipped in of_all("skipped")]
    return BitsReport(
        model=type(model).__name__,
        stage="prepared" if any(report.stage == "prepared" for report in reports.values()) else "converted",
        **{name: one_of(name) for name in ("method", "scope", "scope_reason", "penalty", "lambda_per_bit", "allocation")},
        weights=tuple(
            replace(weight, name=f"{path}.{weight.name}", aliases=tuple(f"{path}.{alias}" for alias in weight.aliases))
            for path, weight in of_all("weights")
        ),
        skipped=(*moved, *own),
        rest_bits=sum(report.rest_bits for report in reports.values()) + sum(_FLOAT_BITS * each.numel() for each in outside.values()),
        rest_float_bits=sum(report.rest_float_bits for report in reports.values()) + sum(8 * each.nbytes for each in outside.values()),
        buffer_bits=_buffer_bits(model),
        settings=tuple(f"{path}: {line}" for path, line in of_all("settings")),
        notes=(
            *(f"target of {path}: {report.target}" for path, report in reports.items() if report.target),
            *(f"{path}: {note}" for path, note in of_all("notes")),
        ),
        curves={f"{path}: {name}": reports[path].curves[name] for path, name in of_all("curves")},
    )


def _buffer_bits(root: nn.Module) -> int:
    """What the buffers of the state take that are not ours, equal tables once."""
    ours = {id(b) for module in root.modules() if isinstance(module, StoredWeight | WeightQuantizer) for b in module.buffers()}
    kept = root.state_dict(keep_vars=True)
    buffers = tables_once(buffer for name, buffer in root.named_buffers() if name in kept and id(buffer) not in ours)
    return sum(8 * narrowed(buffer).nbytes for buffer in buffers)
