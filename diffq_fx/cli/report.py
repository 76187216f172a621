"""``diffq-fx report``: what lies in an ONNX or packed file, and its speed beside another one, as one HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffq_fx.atomic import refuse_same_file
from diffq_fx.cli.output import MIB, Answer, command
from diffq_fx.errors import DiffQError

if TYPE_CHECKING:
    from diffq_fx.export.onnx.benchmark import LatencyComparison
    from diffq_fx.export.onnx.inspection import OnnxInspection
    from diffq_fx.export.packed.packed_report import PackedInspection
    from diffq_fx.report.page import Page, PageWeight


@command
def report(
    file: Annotated[Path, typer.Argument(help="An ONNX file, or one that save_packed has written.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    beside: Annotated[Path | None, typer.Option(help="The float ONNX file: compare size, latency and outputs with it.")] = None,
    repeats: Annotated[int, typer.Option(help="With --beside: pairs of runs to time.")] = 100,
) -> Answer:
    """Write one HTML page about a file: sizes, the bits of every weight, the forms they have and why. It opens offline."""
    from diffq_fx.file_kinds import looks_like_safetensors

    refuse_same_file(out, [file, *([] if beside is None else [beside])], DiffQError)
    if looks_like_safetensors(file):
        if beside is not None:
            raise ValueError("--beside compares ONNX files; a packed file does not run by itself.")
        from diffq_fx.export.packed.packed_report import inspect_packed

        page = _page_of_packed(inspect_packed(file))
    else:
        from diffq_fx.export.onnx.benchmark import compare_latency
        from diffq_fx.export.onnx.inspection import inspect_onnx

        read = [inspect_onnx(each) for each in (file, beside) if each is not None]
        refuse_same_file(
            out,
            [Path(each.path).parent / name for each in read for name in {tensor.external for tensor in each.tensors} if name],
            DiffQError,
        )
        race = None if beside is None else compare_latency(beside, file, repeats=repeats)
        page = _page_of_onnx(read[0], read[1] if race else None, race)
    page.save(out)
    return Answer({"path": str(out), "file_bytes": out.stat().st_size}, [str(out)])


def _page_of_onnx(inspection: "OnnxInspection", other: "OnnxInspection | None", race: "LatencyComparison | None") -> "Page":
    from diffq_fx.report.page import Page

    metadata = inspection.metadata
    opset, tool = inspection.opsets.get("", 0), inspection.producer or "an unknown tool"
    facts = [f"{inspection.file_bytes / MIB:.4g} MiB on disk, opset {opset}, written by {tool}"]
    if metadata is not None:
        target = f", for target {metadata.target}" if metadata.target else ""
        facts.append(f"layout {metadata.layout}, activations {metadata.activations}{target}")
        facts.append(f"levels bit-packed at the learned widths: {metadata.payload_bytes / MIB:.4g} MiB")
    if other is not None and race is not None:
        q1, median, q3 = (f"{value:.2f}" for value in (race.ratio.q1, race.ratio.median, race.ratio.q3))
        facts += [
            f"{other.file_bytes / inspection.file_bytes:.2f} times smaller than {Path(other.path).name}",
            f"{median} times its speed (quartiles {q1} and {q3} of {race.repeats} pairs of runs in turns, on this machine)",
            f"outputs differ from it by at most {100 * race.worst_output.max_relative:.3g} % of its largest value",
            *filter(None, [race.pairing]),
        ]
    rows = [] if race is None else [(race.path_a, race.size_a_mib, race.a_ms), (race.path_b, race.size_b_mib, race.b_ms)]
    measurements = [{"file": Path(path).name, "MiB": f"{size:.4g}", "ms, batch 1": ms.text(".3g")} for path, size, ms in rows]
    sizes = [_onnx_size(each) for each in (inspection, other) if each is not None]
    return Page(title=Path(inspection.path).name, facts=facts, sizes=sizes, weights=_onnx_weights(inspection), measurements=measurements)


def _onnx_size(inspection: "OnnxInspection") -> tuple[str, dict[str, float]]:
    levels, *scales = (inspection.payload_bytes(role) for role in ("quantized", "scale", "zero_point"))
    return _size(inspection, {"levels": levels, "scales, zero points": sum(scales)}, "float, graph")


def _size(file: "OnnxInspection | PackedInspection", parts: dict[str, float], rest: str) -> tuple[str, dict[str, float]]:
    """A file's name and its size in its parts, which are given in bytes; ``rest`` is what they leave of it."""
    whole = {**parts, rest: file.file_bytes - sum(parts.values())}
    return Path(file.path).name, {part: size / MIB for part, size in whole.items()}


def _onnx_weights(inspection: "OnnxInspection") -> "list[PageWeight]":
    from diffq_fx.report.page import PageWeight

    if inspection.metadata is None:
        return [
            PageWeight(
                name=tensor.name,
                shape=tensor.shape,
                histogram={tensor.container_bits: tensor.values} if tensor.container_bits <= 16 else {},
                numel=tensor.values,
                mib=tensor.payload_bytes / MIB,
                read_by=", ".join(tensor.readers),
            )
            for tensor in inspection.tensors
            if tensor.role in ("quantized", "float") and tensor.values
        ]
    return [
        PageWeight.of(
            record,
            histogram=record.bits,
            numel=record.numel,
            mib=record.container_payload_bits / 8 / MIB,
            read_by=record.rule,
            why="; ".join(reason for reason in (record.choice, record.reason, *record.remarks) if reason),
        )
        for record in inspection.metadata.weights
    ]


def _page_of_packed(inspection: "PackedInspection") -> "Page":
    from diffq_fx.report.page import Page, PageWeight

    coded, side = (sum(getattr(weight, part) for weight in inspection.weights) for part in ("coded_bytes", "side_bytes"))
    weights = [
        PageWeight.of(
            weight,
            histogram=weight.bits,
            numel=weight.values,
            mib=(weight.coded_bytes + weight.side_bytes) / MIB,
            read_by=weight.description,
        )
        for weight in inspection.weights
    ]
    facts = [
        f"{inspection.file_bytes / MIB:.4g} MiB, packed format {inspection.version}, entropy-coded in {inspection.shards} shards",
        f"{len(inspection.tensors)} tensors are stored as they are",
    ]
    sizes = [_size(inspection, {"levels": coded, "scales, widths": side}, "not quantized")]
    return Page(title=Path(inspection.path).name, facts=facts, sizes=sizes, weights=weights)
