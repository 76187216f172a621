"""The report as tables of text, which plain text and rich both show."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffq_fx.budget.size import mib

if TYPE_CHECKING:
    from diffq_fx.report.bits_report import BitsReport, SizeParts, WeightBits

_BLOCKS = "▁▂▃▄▅▆▇█"
_NAMES_SHOWN = 6
_LONGEST_RULE = 140
_LARGE_BUFFERS_MIB = 0.01


@dataclass(frozen=True)
class Column:
    """A column: its heading, on which side its cells stand, and how early it goes where there is no room."""

    heading: str
    left: bool = False
    goes: int = 0
    """0: never; else the columns with the highest number go first."""


@dataclass(frozen=True)
class TextTable:
    """A title, columns and rows of cells."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def plain_text(report: "BitsReport") -> str:
    """The whole report in ASCII (but for the names), a line per weight.

    Args:
        report: the report.

    Returns:
        Text without a newline at the end.
    """
    tables = [weight_table(report, blocks=False), size_table(report)]
    if report.skipped:
        tables.append(skipped_table(report))
    return "\n\n".join([*(_plain(table) for table in tables), "\n".join(summary_lines(report))])


def _plain(table: TextTable) -> str:
    cells = [tuple(column.heading for column in table.columns), *table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if column.left else cell.rjust(width) for cell, width, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    rule = "-" * min(max(map(len, lines)), _LONGEST_RULE)
    return "\n".join([table.title, rule, lines[0], rule, *lines[1:]])


def weight_table(report: "BitsReport", *, blocks: bool) -> TextTable:
    """One row per quantized weight.

    Args:
        report: the report.
        blocks: draw the histogram with block characters, one per width from the model's smallest to its largest; else in numbers.

    Returns:
        The table; sizes in MiB.
    """
    widths = range(min(report.histogram), max(report.histogram) + 1)
    columns = (
        Column("weight", left=True),
        Column("shape", left=True, goes=4),
        Column("read by", left=True, goes=5),
        Column("weights"),
        Column("bits"),
        Column("range", goes=2),
        Column(f"{widths[0]}..{widths[-1]} bits" if blocks else "share of each width", left=True),
        Column("levels MiB"),
        Column("overhead MiB", goes=3),
        Column("in ONNX", goes=1),
        Column("ONNX MiB"),
        Column("float MiB", goes=6),
    )
    show = _mib_format(report)
    rows = []
    for weight in report.weights:
        cells = (
            " = ".join((weight.name, *weight.aliases)),
            "x".join(map(str, weight.shape)),
            weight.consumer,
            f"{weight.numel}",
            f"{weight.average_bits:.2f}",
            f"{weight.min_bits}-{weight.max_bits}",
            _sparkline(weight, widths) if blocks else _shares(weight),
            show(weight.payload_bits),
            show(weight.overhead_bits),
            f"{weight.container_bits} bits",
            show(weight.container_payload_bits + weight.container_scale_bits),
            show(weight.float_bits),
        )
        rows.append(cells)
    return TextTable(f"{report.model}, {report.stage}: bits of {_count(len(rows), 'weight tensor')}", columns, tuple(rows))


def size_table(report: "BitsReport") -> TextTable:
    """The three sizes of the model, each in its parts."""
    headings = ("levels", "overhead", "not quantized", "total", "of float")
    columns = (Column("size", left=True), *(Column(heading) for heading in headings))
    show = _mib_format(report)
    whole = report.float_size.total_mib
    rows = []
    for label, size in named_sizes(report):
        parts = (show(size.levels_bits), show(size.overhead_bits), show(size.rest_bits))
        rows.append((label, *parts, show(size.total_bits), f"1/{whole / size.total_mib:.2f}"))
    return TextTable("sizes of the parameters in MiB (overhead: scales, zero points and coded widths)", columns, tuple(rows))


def named_sizes(report: "BitsReport") -> "tuple[tuple[str, SizeParts], ...]":
    """The three sizes and what to call them."""
    return (
        ("bit-packed (exact)", report.packed_size),
        ("ONNX (estimate)", report.container_size),
        ("float", report.float_size),
    )


def skipped_table(report: "BitsReport") -> TextTable:
    """The parameters that stay in float, by reason."""
    by_reason: dict[str, list[str]] = {}
    for each in report.skipped:
        shape = "x".join(map(str, each.shape)) or "scalar"
        by_reason.setdefault(each.reason, []).append(f"{each.name} ({shape})")
    rows = []
    for reason, names in by_reason.items():
        more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        rows.append((reason, str(len(names)), ", ".join(names[:_NAMES_SHOWN]) + more))
    columns = (Column("stays in float because", left=True), Column("parameters"), Column("names", left=True))
    return TextTable("not quantized", columns, tuple(rows))


def summary_lines(report: "BitsReport") -> Iterator[str]:
    """What holds for the whole model, a line each."""
    yield (
        f"{report.average_bits:.3f} bits per quantized weight, {report.average_bits_in_all:.3f} with scales and coded widths; "
        f"{report.packed_size.total_mib:.4g} MiB bit-packed, {report.compression_ratio:.2f} times smaller than float"
    )
    if mib(report.buffer_bits) >= _LARGE_BUFFERS_MIB:
        yield f"buffers: {mib(report.buffer_bits):.4g} MiB beside the parameters (statistics, tables of indices), in none of the sizes"
    if report.target:
        yield f"target: {report.target}"
    elif report.penalty is None:
        yield "target: none"
    if report.lambda_per_bit is not None:
        yield f"lambda: {report.lambda_per_mib:.4g} loss per MiB, {report.lambda_per_bit:.4g} loss per bit"
    yield f"scope: {report.scope}" + (f" ({report.scope_reason})" if report.scope_reason else "")
    for note in report.notes:
        yield f"note: {note}"


class _MibFormat:
    """Bits as MiB with one number of decimals for the whole report: enough to see its smallest weights."""

    def __init__(self, decimals: int) -> None:
        self.decimals = decimals

    def __call__(self, bits: int) -> str:
        return f"{mib(bits):.{self.decimals}f}"


def _mib_format(report: "BitsReport") -> _MibFormat:
    return _MibFormat(4 if report.float_size.total_mib >= 1 else 6)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _shares(weight: "WeightBits") -> str:
    """``2:25% 4:75%``."""
    return " ".join(f"{width}:{percent(count / weight.numel)}" for width, count in weight.histogram.items())


def percent(share: float) -> str:
    """A share of 0 to 1 in whole percent.

    Example:
        >>> percent(0.254), percent(0.004)
        ('25%', '<1%')
    """
    return "<1%" if share < 0.01 else f"{100 * share:.0f}%"


def _sparkline(weight: "WeightBits", widths: range) -> str:
    """One character per width, as high as the share of the weights that have it; a dot for none."""
    shares = [weight.histogram.get(width, 0) / weight.numel for width in widths]
    return "".join(_BLOCKS[math.ceil(share * len(_BLOCKS)) - 1] if share else "·" for share in shares)
