"""``diffq-fx pack`` and ``unpack``, and what ``inspect`` shows of a packed file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from diffq_fx.cli.output import Answer, add_row, command, mean_and_range, mib, new_table

if TYPE_CHECKING:
    from diffq_fx.export.packed.packed_report import PackedInspection, PackedWeightReport, PlainTensorReport

_SMALL_BYTES = 4096
"""Plain tensors of fewer bytes are summed up, not listed."""


@command
def pack(
    file: Annotated[Path, typer.Argument(metavar="FLOAT.safetensors", help="A float state dict.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="PACKED.safetensors", help="The file to write.", show_default=False)],
    bits: Annotated[int, typer.Option(help="Width of every weight, 1 to 16.")] = 8,
    group_size: Annotated[str, typer.Option(help='Weights that share a scale: "tensor", "channel", or a block of so many.')] = "channel",
    grid: Annotated[Literal["affine", "half", "symmetric"], typer.Option(help="Where zero lies between the levels.")] = "affine",
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of names that stay as they are; may be repeated.")] = None,
    compression: Annotated[Literal["entropy", "bits"], typer.Option(help="Smallest file, or fastest to load.")] = "entropy",
) -> Answer:
    """Round the weights of a float state dict to a number of bits, without training, and pack them.

    For trained bits use save_packed(convert_diffq(model), path) in Python; diffq-fx compress finds them without a training.
    """
    from diffq_fx.export.packed.state_dicts import pack_state_dict

    entropy = compression == "entropy"
    rounding = pack_state_dict(file, out, bits=bits, group_size=group_size, grid=grid, exclude=exclude or (), entropy=entropy)
    before, after = file.stat().st_size, out.stat().st_size
    shown = [f"{out}: {mib(after)} MiB, {before / after:.2f} times smaller"]
    worst = max(rounding.errors, key=rounding.errors.__getitem__)
    found = f"{rounding.overall:.3g} over all weights, at most {rounding.errors[worst]:.3g}, of '{worst}'"
    shown.append(f"relative squared error of the rounding: {found}")
    if rounding.skipped:
        shown.append(f"as they were: {', '.join(rounding.skipped)}")
    data = {
        "path": str(out),
        "file_bytes": after,
        "float_file_bytes": before,
        "relative_squared_error": rounding.overall,
        "weights": [{"name": name, "relative_squared_error": error} for name, error in rounding.errors.items()],
        "as_they_were": list(rounding.skipped),
    }
    return Answer(data, shown)


@command
def unpack(
    file: Annotated[Path, typer.Argument(metavar="PACKED.safetensors", help="A packed file.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="FLOAT.safetensors", help="The file to write.", show_default=False)],
) -> Answer:
    """Write the float state dict of a packed file, ready for load_state_dict; a tied weight comes under each of its names."""
    from diffq_fx.export.packed.state_dicts import unpack_state_dict

    unpack_state_dict(file, out)
    size = out.stat().st_size
    return Answer({"path": str(out), "file_bytes": size}, [f"{out}: {mib(size)} MiB"])


def inspect_packed_file(file: Path, *, everything: bool) -> Answer:
    """The weights of a packed file: widths, payload, entropy, overhead."""
    from diffq_fx.export.packed.packed_report import inspect_packed

    inspection = inspect_packed(file)
    return Answer(inspection.to_dict(), [_weight_table(inspection), _tensor_table(inspection, everything), _totals_table(inspection)])


def _weight_table(inspection: "PackedInspection") -> Table:
    sizes = ("bit-packed MiB", "entropy MiB", "coded MiB", "overhead %", "scales MiB")
    table = new_table(
        f"{inspection.path}: quantized weights", folded=("name",), left=("shape", "stored as"), right=("learned bits", *sizes)
    )
    for weight in inspection.weights:
        overhead = 100 * (weight.coded_bytes / weight.entropy_bytes - 1) if weight.entropy_bytes else 0.0
        packed, entropy, coded, side = (
            mib(round(size)) for size in (weight.bit_packed_bytes, weight.entropy_bytes, weight.coded_bytes, weight.side_bytes)
        )
        cells = _names(weight), "x".join(map(str, weight.shape)), weight.description, mean_and_range(weight.bits)
        add_row(table, *cells, packed, entropy, coded, f"{overhead:.1f}", side)
    return table


def _names(tensor: "PackedWeightReport | PlainTensorReport") -> str:
    return "\n= ".join((tensor.name, *tensor.aliases))


def _tensor_table(inspection: "PackedInspection", everything: bool) -> Table:
    table = new_table("stored as they are", folded=("name",), left=("shape", "type", "stored as"), right=("MiB",))
    listed = [tensor for tensor in inspection.tensors if everything or tensor.stored_bytes >= _SMALL_BYTES]
    for tensor in listed:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        add_row(table, _names(tensor), shape, tensor.dtype, tensor.stored_dtype, mib(round(tensor.stored_bytes)))
    if hidden := [tensor.stored_bytes for tensor in inspection.tensors if tensor not in listed]:
        table.caption = f"and {len(hidden)} small ones, {mib(round(sum(hidden)))} MiB together: see --all"
        table.caption_justify = "left"
    return table


def _totals_table(inspection: "PackedInspection") -> Table:
    weights, title = inspection.weights, f"totals; format version {inspection.version}; {inspection.shards} shards"
    table, values = new_table(title, folded=("what",), right=("values", "MiB")), str(sum(weight.values for weight in weights))
    entropy = sum(weight.entropy_bytes for weight in weights)
    add_row(table, "codes at their widths (not in the file)", values, mib(sum(weight.bit_packed_bytes for weight in weights)))
    add_row(table, "entropy of the codes (not in the file)", values, mib(round(entropy)), end_section=True)
    add_row(table, "codes", values, mib(round(sum(weight.coded_bytes for weight in weights))))
    add_row(table, "widths, zero points, scales, codebooks", "", mib(round(sum(weight.side_bytes for weight in weights))))
    add_row(table, "plain tensors", "", mib(round(sum(tensor.stored_bytes for tensor in inspection.tensors))))
    add_row(table, "names, models, checksums", "", mib(inspection.header_bytes), end_section=True)
    add_row(table, "file on disk", "", mib(inspection.file_bytes), style="bold")
    return table
