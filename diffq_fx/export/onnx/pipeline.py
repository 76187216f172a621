"""The steps of an export, in their order. Imports onnx, onnxscript and onnxruntime; :mod:`.exporter` does not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

import diffq_fx
from diffq_fx.atomic import draft_folder
from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export.onnx.branches import SIZE_ADVICE
from diffq_fx.export.onnx.calibration import Calibration, calibrate
from diffq_fx.export.onnx.causes import failure_cause
from diffq_fx.export.onnx.examples import ExportExample
from diffq_fx.export.onnx.integer_products import check_products
from diffq_fx.export.onnx.layout.apply import Applied, apply_layout
from diffq_fx.export.onnx.layout.functions import call_functions
from diffq_fx.export.onnx.layout.request import LayoutRequest
from diffq_fx.export.onnx.layout.rounding import watch
from diffq_fx.export.onnx.layout.table import read_table
from diffq_fx.export.onnx.measuring import Stopwatch
from diffq_fx.export.onnx.metadata import ExportMetadata, to_props
from diffq_fx.export.onnx.narrowing import HalvedModel, halved_names, store_halves, store_narrow_tables
from diffq_fx.export.onnx.opset import set_opset
from diffq_fx.export.onnx.parity import DraftFiles, Parity, SizeError, check_parity
from diffq_fx.export.onnx.result import ExportResult
from diffq_fx.export.onnx.saving import publish, save_draft
from diffq_fx.export.onnx.sessions import wanted_entries
from diffq_fx.export.onnx.slimming import drop_what_is_derived
from diffq_fx.export.onnx.tracing import TracedModel, trace, weights_by_initializer
from diffq_fx.storage import IntegerWeight, StoredWeight

_ROUGH = 0.1
"""A relative error of the rounded activations that is worth a remark."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What one export works on."""

    converted: nn.Module
    weights: dict[str, StoredWeight]
    example: ExportExample
    traced: TracedModel
    halved: set[str]
    folder: Path
    path: Path
    request: LayoutRequest
    verify: bool
    typical: ExportExample | None = None
    """Inputs as the model sees them in use, if the user has given any."""


@dataclass(frozen=True, eq=False)
class _Draft:
    """A file that is written and checked, but not yet in its place."""

    file: Path
    opset: int
    metadata: ExportMetadata
    parity: Parity | None


def export_file(
    converted: nn.Module,
    example_inputs: Any,
    path: Path,
    request: LayoutRequest,
    *,
    calibration: Iterable[Any] | None,
    dynamic_shapes: Any,
    verify: bool,
) -> ExportResult:
    """Trace, calibrate, lay out, write, check, publish (see :func:`diffq_fx.export.onnx.exporter.export_onnx`).

    Raises:
        ExportError: Any of the steps fails; the target is as it was.
    """
    example = ExportExample.of(example_inputs).on_its_own()
    try:
        with draft_folder(path, ExportError) as folder:
            try:
                job = _job(converted, example, path, folder, request, dynamic_shapes, verify=verify)
                if calibration is not None:
                    found = _calibrated(job, calibration)
                    job = replace(job, request=replace(job.request, ranges=found.ranges), typical=found.first)
                job, draft = _drafted(job, dynamic_shapes)
            except DiffQError as error:
                raise ExportError(failure_cause(converted, example, error)) from error
            file_bytes = publish(draft.file, path)
    except DiffQError as error:
        raise ExportError(f"export_onnx: {error}") from error
    return _result(job, draft, file_bytes)


def _job(
    converted: nn.Module, example: ExportExample, path: Path, folder: Path, request: LayoutRequest, dynamic_shapes: Any, *, verify: bool
) -> _Job:
    weights = weights_by_initializer(converted)
    for weight in weights.values():
        if isinstance(weight, IntegerWeight):
            read_table(weight)  # a weight without ONNX form is found before the long work begins
    traced = trace(converted, example, dynamic_shapes)
    halved = halved_names(converted)
    return _Job(
        converted=converted,
        weights=weights,
        example=example,
        traced=traced,
        halved=halved,
        folder=folder,
        path=path,
        request=replace(request, sizes=traced.sizes, halved=frozenset(halved)),
        verify=verify,
    )


def _drafted(job: _Job, dynamic_shapes: Any) -> tuple[_Job, _Draft]:
    """Draft the file; with a static batch where it is wrong at another one."""
    try:
        return job, _draft_without_dequantization(job)
    except SizeError as error:
        if dynamic_shapes is not None:
            raise ExportError(f"{error}. {SIZE_ADVICE}") from error
        traced = trace(job.converted, job.example, None, static=str(error))
        job = replace(job, traced=traced, request=replace(job.request, sizes=traced.sizes))
        return job, _draft_without_dequantization(job)


def _calibrated(job: _Job, calibration: Iterable[Any]) -> Calibration:
    """The range of every activation that is to be rounded."""
    model, applied, _ = _laid_out(job, {}, twin=True)
    watched = watch(model, applied.rounded)
    return calibrate(save_draft(model, job.folder / "calibration", job.path), watched, calibration, job.example, job.traced.model.graph)


def _draft_without_dequantization(job: _Job) -> _Draft:
    """Draft the file; what this onnxruntime turns out to dequantize at every run is folded in a second draft."""
    draft = _draft(job, {})
    refused = _dequantized_weights(job, draft)
    if not refused:
        return draft
    reason = "this onnxruntime does not fuse it here: it would be dequantized at every run"
    return _draft(job, dict.fromkeys(refused, reason))


def _draft(job: _Job, refused: Mapping[str, str]) -> _Draft:
    model, applied, opset = _laid_out(job, refused)
    request = job.request
    entries = wanted_entries(request.layout)
    metadata = ExportMetadata(
        layout=request.layout,
        activations=request.activations,
        target=None if request.layout == "qdq" else request.target,
        session=entries,
        weights=applied.records,
    )
    drop_what_is_derived(model)
    if request.layout != "qdq":  # other runtimes may not know functions
        call_functions(model)
    model.producer_name = "diffq_fx"
    model.producer_version = diffq_fx.__version__
    model.metadata_props.update(to_props(metadata))
    file = save_draft(model, job.folder / "published", job.path)
    check_products(file)
    parity = _parity(job, refused, DraftFiles(file, entries, file)) if job.verify else None
    return _Draft(file, opset, metadata, parity)


def _laid_out(job: _Job, refused: Mapping[str, str], *, twin: bool = False) -> tuple[ir.Model, Applied, int]:
    model = job.traced.model.clone()
    applied = apply_layout(model, job.weights, replace(job.request, refused=refused, twin=twin))
    store_halves(model, job.halved)
    store_narrow_tables(model)
    return model, applied, set_opset(model, job.request.opset)


def _parity(job: _Job, refused: Mapping[str, str], files: DraftFiles) -> Parity:
    if job.request.rounds:
        model, _, _ = _laid_out(job, refused, twin=True)
        files = replace(files, exact=save_draft(model, job.folder / "exact", job.path))
    reference = HalvedModel(job.converted, job.halved) if job.halved else job.converted
    return check_parity(files, reference, job.example, job.traced, job.typical)


def _dequantized_weights(job: _Job, draft: _Draft) -> list[str]:
    if job.request.layout == "qdq" or draft.parity is None:
        return []
    nodes = draft.parity.dequantized
    return [w.name for w in draft.metadata.weights if any(node.startswith(f"{w.name}.") for node in nodes)]


def _remarks(job: _Job, draft: _Draft) -> list[str]:
    remarks = list(job.traced.remarks)
    unread = {weight.spec.name for weight in job.weights.values()} - {record.name for record in draft.metadata.weights}
    if unread:
        remarks.append(f"the graph does not read {', '.join(sorted(unread))}: not in the file")
    if dequantized := _dequantized_weights(job, draft):
        remarks.append(f"onnxruntime dequantizes at every run: {', '.join(dequantized)}")
    if isinstance(job.request.machines, Stopwatch) and (skipped := len(job.request.machines.skipped)):
        remarks.append(f"the time for measuring was over before {skipped} products: their form is that of the portable profiles")
    if draft.parity is not None and draft.parity.remark:
        remarks.append(draft.parity.remark)
    if job.request.rounds and draft.parity is not None and draft.parity.fast_relative_error > _ROUGH:
        remarks.append(
            f"rounding activations changes the outputs by up to {draft.parity.fast_relative_error:.0%} of their largest value: "
            "measure the file's accuracy before you use it"
        )
    return remarks


def _result(job: _Job, draft: _Draft, file_bytes: int) -> ExportResult:
    metadata, parity = draft.metadata, draft.parity
    return ExportResult(
        path=job.path,
        opset=draft.opset,
        layout=metadata.layout,
        activations=metadata.activations,
        target=metadata.target,
        weights=metadata.weights,
        payload_bytes=-(-metadata.payload_bits // 8),
        container_payload_bytes=-(-metadata.container_payload_bits // 8),
        file_bytes=file_bytes,
        max_abs_error=None if parity is None else parity.max_abs_error,
        max_relative_error=None if parity is None else parity.max_relative_error,
        fast_relative_error=None if parity is None else parity.fast_relative_error,
        operators=None if parity is None else parity.operators,
        remarks=tuple(_remarks(job, draft)),
    )
