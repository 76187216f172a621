"""``diffq-fx report``: what lies in an ONNX or packed file, and its speed beside another one, as one HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffq_fx.cli.output import errors_as_messages, standard_output

if TYPE_CHECKING:
    from diffq_fx.export.onnx.benchmark import LatencyComparison
    from diffq_fx.export.onnx.inspection import OnnxInspection
    from diffq_fx.export.packed.packed_report import PackedInspection
    from diffq_fx.report.page import Page, PageSize, PageWeight

_MIB = 2**20


def report(
    file: Annotated[Path, typer.Argument(help="An ONNX file, or one that save_packed has written.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    beside: Annotated[Path | None, typer.Option(help="The float ONNX file: compare size, latency and outputs with it.")] = None,
    repeats: Annotated[int, typer.Option(help="With --beside: pairs of runs to time.")] = 100,
) -> None:
    """Write one HTML page about a file: sizes, the bits of every weight, the forms they have and why. It opens offline."""
    with errors_as_messages():
        from diffq_fx.export.packed.container import looks_packed

        if out.exists() and any(out.samefile(each) for each in (file, beside) if each is not None and each.exists()):
            raise ValueError(f"--out {out} is one of the files to report on. Give the page another name.")
        if looks_packed(file):
            if beside is not None:
                raise ValueError("--beside compares ONNX files; a packed file does not run by itself.")
            from diffq_fx.export.packed.packed_report import inspect_packed

            page = _page_of_packed(inspect_packed(file))
        else:
            from diffq_fx.export.onnx.benchmark import compare_latency
            from diffq_fx.export.onnx.inspection import inspect_onnx

            other = None if beside is None else inspect_onnx(beside)
            race = None if beside is None else compare_latency(beside, file, repeats=repeats)
            page = _page_of_onnx(inspect_onnx(file), other, race)
        standard_output().print(str(page.save(out)), markup=False, soft_wrap=True)


def _page_of_onnx(inspection: "OnnxInspection", other: "OnnxInspection | None", race: "LatencyComparison | None") -> "Page":
    from diffq_fx.report.page import Page

    metadata = inspection.metadata
    facts = [
        f"{inspection.file_bytes / _MIB:.4g} MiB on disk, opset {inspection.opset}, written by {inspection.producer or 'an unknown tool'}"
    ]
    if metadata is not None:
        target = f", for target {metadata.target}" if metadata.target else ""
        facts.append(f"layout {metadata.layout}, activations {metadata.activations}{target}")
        facts.append(f"levels bit-packed at the learned widths: {metadata.payload_bytes / _MIB:.4g} MiB")
    if other is not None and race is not None:
        q1, median, q3 = (f"{value:.2f}" for value in (race.ratio.q1, race.ratio.median, race.ratio.q3))
        facts += [
            f"{other.file_bytes / inspection.file_bytes:.2f} times smaller than {Path(other.path).name}",
            f"{median} times its speed (quartiles {q1} and {q3} of {race.repeats} pairs of runs in turns, on this machine)",
            f"outputs differ from it by at most {100 * race.worst_output.max_relative:.3g} % of its largest value",
        ]
    sizes = [_onnx_size(each) for each in (inspection, other) if each is not None]
    return Page(title=Path(inspection.path).name, facts=facts, sizes=sizes, weights=_onnx_weights(inspection))


def _onnx_size(inspection: "OnnxInspection") -> "PageSize":
    from diffq_fx.report.page import PageSize

    levels = inspection.payload_bytes("quantized")
    scales = inspection.payload_bytes("scale") + inspection.payload_bytes("zero_point")
    parts = {"levels": levels, "scales, zero points": scales, "float, graph": inspection.file_bytes - levels - scales}
    return PageSize(name=Path(inspection.path).name, parts={part: size / _MIB for part, size in parts.items()})


def _onnx_weights(inspection: "OnnxInspection") -> "list[PageWeight]":
    from diffq_fx.report.page import PageWeight

    if inspection.metadata is None:
        return [
            PageWeight(
                name=tensor.name,
                shape=tensor.shape,
                histogram={tensor.container_bits: tensor.values} if tensor.container_bits <= 16 else {},
                numel=tensor.values,
                mib=tensor.payload_bytes / _MIB,
                read_by=", ".join(tensor.readers),
            )
            for tensor in inspection.tensors
            if tensor.role in ("quantized", "float") and tensor.values
        ]
    return [
        PageWeight(
            name=" = ".join((record.name, *record.aliases)),
            shape=record.shape,
            histogram=record.bits,
            numel=record.numel,
            mib=record.container_payload_bits / 8 / _MIB,
            read_by=record.rule,
            why="; ".join(reason for reason in (record.choice, record.reason, *record.remarks) if reason),
        )
        for record in inspection.metadata.weights
    ]


def _page_of_packed(inspection: "PackedInspection") -> "Page":
    from diffq_fx.report.page import Page, PageSize, PageWeight

    coded, side = (sum(getattr(weight, part) for weight in inspection.weights) for part in ("coded_bytes", "side_bytes"))
    parts = {"levels": coded, "scales, widths": side, "not quantized": inspection.file_bytes - coded - side}
    weights = [
        PageWeight(
            name=" = ".join((weight.name, *weight.aliases)),
            shape=weight.shape,
            histogram=weight.bits,
            numel=weight.values,
            mib=(weight.coded_bytes + weight.side_bytes) / _MIB,
            read_by=weight.description,
        )
        for weight in inspection.weights
    ]
    facts = [
        f"{inspection.file_bytes / _MIB:.4g} MiB, packed format {inspection.version}, entropy-coded in {inspection.shards} shards",
        f"{len(inspection.tensors)} tensors are stored as they are",
    ]
    sizes = [PageSize(name=Path(inspection.path).name, parts={part: size / _MIB for part, size in parts.items()})]
    return Page(title=Path(inspection.path).name, facts=facts, sizes=sizes, weights=weights)
