"""The steps of an export, in their order. Imports onnx, onnxscript and onnxruntime; :mod:`.exporter` does not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import diffq_fx
from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.examples import Example
from diffq_fx.export.onnx.exporter import ExportResult
from diffq_fx.export.onnx.halves import HalvedModel, halved_names, store_halves, wants_halves
from diffq_fx.export.onnx.layout.apply import apply_layout
from diffq_fx.export.onnx.layout.plan import Layout
from diffq_fx.export.onnx.layout.table import read_table
from diffq_fx.export.onnx.metadata import ExportMetadata, to_props
from diffq_fx.export.onnx.opset import set_opset
from diffq_fx.export.onnx.parity import Parity, check_parity
from diffq_fx.export.onnx.saving import draft_folder, publish, save_draft
from diffq_fx.export.onnx.tracing import TracedModel, trace, weights_by_initializer
from diffq_fx.storage import IntegerWeight, StoredWeight


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What one export works on."""

    converted: nn.Module
    weights: dict[str, StoredWeight]
    example: Example
    traced: TracedModel
    halved: set[str]
    folder: Path
    path: Path
    layout: Layout
    opset: int | None
    verify: bool


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
    layout: Layout,
    dynamic_shapes: Any,
    opset: int | None,
    verify: bool,
) -> ExportResult:
    """Trace, lay out, write, check, publish (see :func:`diffq_fx.export.onnx.exporter.export_onnx`).

    Raises:
        ExportError: Any of the steps fails; the target is as it was.
    """
    example = Example.of(example_inputs)
    try:
        with draft_folder(path) as folder:
            weights = weights_by_initializer(converted)
            for weight in weights.values():
                if isinstance(weight, IntegerWeight):
                    read_table(weight)  # a weight without ONNX form is found before the long work begins
            job = _Job(
                converted=converted,
                weights=weights,
                example=example,
                traced=trace(converted, example, dynamic_shapes),
                halved=halved_names(converted) if wants_halves(converted) else set(),
                folder=folder,
                path=path,
                layout=layout,
                opset=opset,
                verify=verify,
            )
            draft = _draft_without_dequantization(job)
            file_bytes = publish(draft.file, path)
    except ExportError as error:
        raise ExportError(f"export_onnx: {error}") from error
    return _result(job, draft, file_bytes)


def _draft_without_dequantization(job: _Job) -> _Draft:
    """Draft the file; what this onnxruntime turns out to dequantize at every run is folded in a second draft."""
    draft = _draft(job, {})
    refused = _dequantized_weights(job, draft)
    if not refused:
        return draft
    reason = "this onnxruntime does not fuse it here: it would be dequantized at every run"
    return _draft(job, dict.fromkeys(refused, reason))


def _draft(job: _Job, refused: dict[str, str]) -> _Draft:
    model = job.traced.model.clone()
    records = apply_layout(model, job.weights, job.layout, job.traced.sizes, refused)
    store_halves(model, job.halved)
    opset = set_opset(model, job.opset)
    metadata = ExportMetadata(layout=job.layout, weights=records)
    model.producer_name = "diffq_fx"
    model.producer_version = diffq_fx.__version__
    model.metadata_props.update(to_props(metadata))
    file = save_draft(model, job.folder, job.path.name)
    reference = HalvedModel(job.converted, job.halved) if job.halved else job.converted
    parity = check_parity(file, reference, job.example, job.traced) if job.verify else None
    return _Draft(file, opset, metadata, parity)


def _dequantized_weights(job: _Job, draft: _Draft) -> list[str]:
    if job.layout == "qdq" or draft.parity is None:
        return []
    nodes = draft.parity.dequantized
    return [w.name for w in draft.metadata.weights if any(node.startswith(f"{w.name}.") for node in nodes)]


def _remarks(job: _Job, draft: _Draft) -> list[str]:
    remarks = list(job.traced.remarks)
    unread = {weight.spec.name for weight in job.weights.values()} - {record.name for record in draft.metadata.weights}
    if unread:
        remarks.append(f"the graph does not read {', '.join(sorted(unread))}: not in the file")
    if job.layout == "onnxruntime" and draft.parity is not None and draft.parity.dequantized:
        remarks.append(f"onnxruntime dequantizes at every run: {', '.join(draft.parity.dequantized)}")
    return remarks


def _result(job: _Job, draft: _Draft, file_bytes: int) -> ExportResult:
    metadata, parity = draft.metadata, draft.parity
    return ExportResult(
        path=job.path,
        opset=draft.opset,
        layout=metadata.layout,
        weights=metadata.weights,
        payload_bytes=-(-metadata.payload_bits // 8),
        container_payload_bytes=-(-metadata.container_payload_bits // 8),
        file_bytes=file_bytes,
        max_abs_error=None if parity is None else parity.max_abs_error,
        max_relative_error=None if parity is None else parity.max_relative_error,
        operators=None if parity is None else parity.operators,
        remarks=tuple(_remarks(job, draft)),
    )
