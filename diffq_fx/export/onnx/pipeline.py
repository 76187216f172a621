"""The steps of an export, in their order. Imports onnx, onnxscript and onnxruntime; :mod:`.exporter` does not."""

import gc
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

import diffq_fx
from diffq_fx.atomic import draft_folder
from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export.onnx.branches import SIZE_ADVICE
from diffq_fx.export.onnx.calibration import calibrate
from diffq_fx.export.onnx.causes import failure_cause
from diffq_fx.export.onnx.decoder import in_mid_text, sizes_of_text, tensors_for_cache
from diffq_fx.export.onnx.examples import ExportExample
from diffq_fx.export.onnx.integer_products import check_products
from diffq_fx.export.onnx.layout.apply import Applied, apply_layout, read_weight
from diffq_fx.export.onnx.layout.functions import call_functions
from diffq_fx.export.onnx.layout.request import LayoutRequest, Twin
from diffq_fx.export.onnx.layout.rounding import watch
from diffq_fx.export.onnx.measuring import Stopwatch
from diffq_fx.export.onnx.metadata import ExportMetadata, ExportResult, to_props
from diffq_fx.export.onnx.naming import InterfaceNames, check_names
from diffq_fx.export.onnx.opset import set_opset
from diffq_fx.export.onnx.parity import DraftFiles, Parity, SizeError, check_parity
from diffq_fx.export.onnx.saving import publish, save_draft, save_unfolded
from diffq_fx.export.onnx.sessions import wanted_entries
from diffq_fx.export.onnx.slimming import HalvedModel, drop_what_is_derived, halved_names, store_narrow
from diffq_fx.export.onnx.tracing import TracedModel, Tracer
from diffq_fx.export.onnx.translation import weights_by_initializer
from diffq_fx.storage import StoredWeight
from diffq_fx.threads import TRACING

_ROUGH = 0.1
"""A relative error of the rounded activations that is worth a remark."""
_MANY_FLOATS = 2**24
"""Folded weights beyond which the check does not fold: onnxruntime (1.31) takes three to four times their size while it does."""
_MEASURED = ("max_abs_error", "max_relative_error", "fast_relative_error", "rounding_relative_error", "operators")
_NOT_FUSED = "this onnxruntime does not fuse it here: it would be dequantized at every run"


@dataclass(frozen=True, eq=False)
class _Draft:
    """A file that is written and checked, but not yet in its place."""

    file: Path
    runs: Path
    """What the check and the calibration run in its place."""
    opset: int
    metadata: ExportMetadata
    parity: Parity | None = None

    @property
    def dequantized(self) -> list[str]:
        """The weights that onnxruntime dequantizes at every run, as in layout "qdq" it shall."""
        if self.metadata.layout == "qdq" or self.parity is None:
            return []
        nodes = self.parity.dequantized
        return [weight.name for weight in self.metadata.weights if any(node.startswith(f"{weight.name}.") for node in nodes)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What one export works on."""

    tracer: Tracer
    weights: dict[str, StoredWeight]
    traced: TracedModel
    folder: Path
    path: Path
    request: LayoutRequest
    verify: bool
    typical: ExportExample | None = None
    """Inputs as the model sees them in use, if the user has given any."""

    def with_fewer_sizes(self, reason: str) -> "_Job":
        """The same with less that is dynamic, for this reason."""
        return replace(self, traced=self.tracer.trace(self.traced.fewer, reason))

    def calibrated(self, calibration: Iterable[Any]) -> "_Job":
        """With the range of every activation that is to be rounded."""
        file, watched = self._twin({}, "calibration", "float", watched=True)
        ranges, first = calibrate(file, watched, calibration, self.tracer.example, self.traced.model.graph)
        return replace(self, request=replace(self.request, ranges=ranges), typical=first)

    def draft(self, refused: Mapping[str, str] | None = None) -> _Draft:
        """The file; what this onnxruntime turns out to dequantize at every run is folded, as ``refused``, in a second draft."""
        draft = self._written(refused or {})
        draft = replace(draft, parity=self._parity(refused or {}, draft)) if self.verify else draft
        return self.draft(dict.fromkeys(draft.dequantized, _NOT_FUSED)) if draft.dequantized and refused is None else draft

    def _written(self, refused: Mapping[str, str]) -> _Draft:
        model, applied = self._laid_out(refused)
        layout = self.request.layout
        metadata = ExportMetadata(
            layout=layout,
            activations=self.request.activations,
            target=None if layout == "qdq" else self.request.target,
            session=wanted_entries(layout),
            sizes=self.traced.sizes,
            fixed_sizes=self.traced.fixed,
            weights=applied.records,
        )
        drop_what_is_derived(model)
        if layout != "qdq":  # other runtimes may not know functions
            call_functions(model)
        model.producer_name, model.producer_version = "diffq_fx", diffq_fx.__version__
        model.metadata_props.update(to_props(metadata))
        file, runs = self._saved(model, applied, "published")
        check_products(file)
        return _Draft(file, runs, model.opset_imports[""], metadata)

    def _twin(self, refused: Mapping[str, str], name: str, kind: Twin, *, watched: bool = False) -> tuple[Path, dict[str, tuple[str, str]]]:
        """A file with products in float, and the outputs with the ranges of rounded activations if they are ``watched``."""
        model, applied = self._laid_out(refused, kind)
        outputs = watch(model, applied.rounded) if watched else {}
        return self._saved(model, applied, name)[1], outputs

    def _saved(self, model: ir.Model, applied: Applied, name: str) -> tuple[Path, Path]:
        """A file, and what is run of it: a copy where onnxruntime would fold many weights."""
        file = save_draft(model, self.folder / name, self.path)
        folded = [record for record in applied.records if record.rule in ("fold", "codebook")]
        if sum(math.prod(record.shape) for record in folded) <= _MANY_FLOATS:
            return file, file
        return file, save_unfolded(file, [record.name for record in folded], self.folder / f"{name}.unfolded")

    def _laid_out(self, refused: Mapping[str, str], twin: Twin = None) -> tuple[ir.Model, Applied]:
        model = self.traced.model.clone()
        applied = apply_layout(model, self.weights, replace(self.request, sizes=self.traced.sizes, refused=refused, twin=twin))
        store_narrow(model, self.request.halved)
        set_opset(model, self.request.opset)
        return model, applied

    def _parity(self, refused: Mapping[str, str], draft: _Draft) -> Parity:
        exact = self._twin(refused, "exact", "float")[0] if self.request.rounds else draft.runs
        has_products = any("dynamic" in record.rule for record in draft.metadata.weights)
        rounded = self._twin(refused, "rounded", "rounded")[0] if has_products else exact
        halved = self.request.halved
        reference = HalvedModel(self.tracer.converted, halved) if halved else self.tracer.converted
        files = DraftFiles(draft.file, draft.metadata.session, draft.runs, exact, rounded)
        if sum(weight.spec.numel for weight in self.weights.values()) > _MANY_FLOATS:
            gc.collect()  # graphs are reference cycles: each that was written or read holds its levels until then
        return check_parity(files, reference, self.tracer.example, self.traced, self.typical)


def export_file(
    converted: nn.Module,
    example_inputs: Any,
    path: Path,
    request: LayoutRequest,
    *,
    calibration: Iterable[Any] | None,
    dynamic_shapes: Any,
    names: InterfaceNames,
    cache: bool,
    verify: bool,
) -> ExportResult:
    """Trace, calibrate, lay out, write, check, publish (see :func:`diffq_fx.export.onnx.exporter.export_onnx`).

    Raises:
        ExportError: Any of the steps fails; the target is as it was.
    """
    example = ExportExample.of(example_inputs).on_its_own()
    weights = weights_by_initializer(converted)
    needed: tuple[tuple[int, int], ...] = ()
    try:
        with TRACING, draft_folder(path, ExportError) as folder, ExitStack() as stack:
            if cache:
                example = in_mid_text(converted, example)
                stack.enter_context(tensors_for_cache(converted, example))
                needed = sizes_of_text(example)
            check_names("input_names", names.inputs, len(example.tensors))
            check_names("output_names", names.outputs)
            tracer = Tracer(converted, example, dynamic_shapes, names, needed)
            try:
                for weight in weights.values():
                    read_weight(weight)  # one without ONNX form is found before the long work begins
                traced = tracer.trace()
                request = replace(request, halved=frozenset(halved_names(converted)))
                job = _Job(tracer=tracer, weights=weights, traced=traced, folder=folder, path=path, request=request, verify=verify)
                job, draft = _drafted(job if calibration is None else job.calibrated(calibration))
            except DiffQError as error:
                raise ExportError(failure_cause(converted, example, error)) from error
            file_bytes = publish(draft.file, path)
    except DiffQError as error:
        raise ExportError(f"export_onnx: {error}") from error
    return _result(job, draft, file_bytes)


def _drafted(job: _Job) -> tuple[_Job, _Draft]:
    """The file with as many dynamic sizes as it is right with."""
    try:
        return job, job.draft()
    except SizeError as error:
        if job.tracer.dynamic_shapes is not None:
            raise ExportError(f"{error}. {SIZE_ADVICE}") from error
        reason = str(error)
    return _drafted(job.with_fewer_sizes(reason))


def _result(job: _Job, draft: _Draft, file_bytes: int) -> ExportResult:
    measured: dict[str, Any] = {name: getattr(draft.parity, name, None) for name in _MEASURED}
    return ExportResult(
        **vars(draft.metadata),
        **measured,
        path=job.path,
        opset=draft.opset,
        file_bytes=file_bytes,
        remarks=tuple(_remarks(job, draft)),
    )


def _remarks(job: _Job, draft: _Draft) -> list[str]:
    remarks, machines = list(job.traced.remarks), job.request.machines
    if unread := {weight.spec.name for weight in job.weights.values()} - {record.name for record in draft.metadata.weights}:
        remarks.append(f"the graph does not read {', '.join(sorted(unread))}: not in the file")
    if draft.dequantized:
        remarks.append(f"onnxruntime dequantizes at every run: {', '.join(draft.dequantized)}")
    if isinstance(machines, Stopwatch) and machines.skipped:
        remarks.append(
            f"the time for measuring was over before {len(machines.skipped)} products: their form is that of the portable profiles"
        )
    if draft.parity is not None and draft.parity.remark:
        remarks.append(draft.parity.remark)
    if job.request.rounds and draft.parity is not None and draft.parity.fast_relative_error > _ROUGH:
        remarks.append(
            f"rounding activations changes the outputs by up to {draft.parity.fast_relative_error:.0%} of their largest value: "
            "measure the file's accuracy before you use it"
        )
    return remarks
