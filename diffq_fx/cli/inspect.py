"""``diffq-fx inspect``: what lies in an ONNX or packed file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from diffq_fx.cli.output import Answer, add_row, command, mean_and_range, mib, new_table
from diffq_fx.cli.packed import inspect_packed_file

if TYPE_CHECKING:
    from diffq_fx.export.onnx.inspection import OnnxInspection, Role, TensorReport
    from diffq_fx.export.onnx.metadata import ExportMetadata

_SMALL_VALUES = 1024
"""Float and other tensors with fewer values are summed up, not listed."""


_ROLES: "dict[Role, str]" = {
    "quantized": "quantized, in ONNX containers",
    "scale": "scales",
    "zero_point": "zero points",
    "float": "float",
    "other": "other (indices, shapes, text)",
}


@command
def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, or one that save_packed has written.", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="List scales, zero points and small tensors too.")] = False,
) -> Answer:
    """Show the weights of a file: widths and what they take; in ONNX their container, scales and who reads them."""
    from diffq_fx.file_kinds import looks_like_safetensors

    if looks_like_safetensors(file):
        return inspect_packed_file(file, everything=everything)
    from diffq_fx.export.onnx.inspection import inspect_onnx

    inspection = inspect_onnx(file)
    forms = [] if inspection.metadata is None else [_forms_table(inspection.metadata)]
    return Answer(inspection.to_dict(), [_tensor_table(inspection, everything), *forms, _totals_table(inspection)])


def _tensor_table(inspection: "OnnxInspection", everything: bool) -> Table:
    learned = ("learned bits", "learned MiB") if inspection.metadata else ()
    table = new_table(
        f"{inspection.path}: tensors",
        folded=("name", "read by"),
        left=("shape", "type"),
        right=("MiB", "scales MiB", "file %", *learned),
    )
    hidden = []
    for tensor in inspection.tensors:
        is_listed = tensor.role == "quantized" or (tensor.role in ("float", "other") and tensor.values >= _SMALL_VALUES)
        if everything or is_listed:
            cells = _cells(tensor)[: len(table.columns)]
            add_row(table, *cells, style="dim" if tensor.role != "quantized" else None)
        else:
            hidden.append(tensor.payload_bytes)
    if hidden:
        table.caption = Text(f"and {len(hidden)} more (scales, zero points, small tensors), {mib(sum(hidden))} MiB together: see --all")
        table.caption_justify = "left"
    return table


def _cells(tensor: "TensorReport") -> list[str]:
    return [
        tensor.name,
        "\n".join(tensor.readers) or "nothing",
        "x".join(map(str, tensor.shape)) or "scalar",
        tensor.dtype if not tensor.is_packed else f"{tensor.container_bits} bits in {tensor.dtype}",
        mib(tensor.payload_bytes),
        mib(tensor.scale_bytes + tensor.zero_point_bytes) if tensor.role == "quantized" else "-",
        f"{100 * tensor.file_share:.1f}",
        mean_and_range(tensor.learned_bits),
        mib(tensor.learned_payload_bytes),
    ]


def _forms_table(metadata: "ExportMetadata") -> Table:
    """How the weights reach their readers, and what decided; weights of which all that is the same share a row."""
    target = f"; target {metadata.target}" if metadata.target else ""
    table = new_table(f"forms; activations {metadata.activations}{target}", folded=("weights", "grid", "rule", "why"))
    names: dict[tuple[str, str, str], list[str]] = {}
    for record in metadata.weights:
        reasons = [reason for reason in (record.choice, record.reason, *record.remarks) if reason]
        names.setdefault((record.grid, record.rule, "\n".join(reasons) or "-"), []).append(record.name)
    for decided, alike in names.items():
        add_row(table, "\n".join(alike), *decided)
    return table


def _totals_table(inspection: "OnnxInspection") -> Table:
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in inspection.opsets.items())
    layout = f"; layout {inspection.metadata.layout}" if inspection.metadata else ""
    table = new_table(f"totals; opset {opsets}; IR {inspection.ir_version}{layout}", folded=("what",), right=("tensors", "values", "MiB"))
    if inspection.metadata is not None:
        levels = sum(record.numel for record in inspection.metadata.weights)
        add_row(table, "quantized, bit-packed as learned", "", str(levels), mib(inspection.metadata.payload_bytes))
    for role, text in _ROLES.items():
        tensors = inspection.of_role(role)
        if tensors or role in ("quantized", "float"):
            values = sum(tensor.values for tensor in tensors)
            add_row(table, text, str(len(tensors)), str(values), mib(inspection.payload_bytes(role)))
    rest = inspection.file_bytes - inspection.payload_bytes()
    add_row(table, "graph, names, encoding", "", "", mib(rest), end_section=True)
    add_row(table, "file on disk", str(len(inspection.tensors)), "", mib(inspection.file_bytes), style="bold")
    return table
