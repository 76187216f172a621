"""The report as rich tables: cut to the console that they are printed in, and captured as plain text with nothing left out."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from diffq_fx.budget.size import mib
from diffq_fx.report.numbers import BitsNumbers, SizeParts

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BOX = box.Box(str(box.SIMPLE_HEAD).replace("─", "-"), ascii=True)
_GAP = 3
_NARROWEST_NAME = 24
_NO_LIMIT = 100_000
_NAMES_SHOWN = 6
_LARGE_BUFFERS_MIB = 0.01


@dataclass(frozen=True)
class _Column:
    """A column of a table: its heading, its cells, on which side they stand, and how early it goes where there is no room."""

    heading: str
    cells: list[str]
    left: bool = False
    goes: int = 0
    """0: never; else the columns with the highest number go first."""

    @property
    def width(self) -> int:
        """Characters of the longest cell."""
        return max(map(len, (self.heading, *self.cells)))


def plain_text(report: BitsNumbers) -> str:
    """The whole report in ASCII (but for the names), a line per weight, without a newline at the end."""
    console = Console(width=_NO_LIMIT, color_system=None)
    options = replace(console.options, encoding="ascii")
    segments = console.render(Group(*report_tables(report, options)), options)
    return "\n".join(line.rstrip() for line in "".join(segment.text for segment in segments).splitlines()).rstrip()


def report_tables(report: BitsNumbers, options: ConsoleOptions) -> Iterator[RenderableType]:
    """What rich prints of a report; where the console is narrow, the less important columns go, never a row."""
    in_ascii = options.ascii_only
    columns = _weight_columns(report, in_ascii)
    shown = _columns_that_fit(columns, options.max_width)
    count = len(report.weights)
    yield from _titled(f"{report.model}, {report.stage}: bits of {count} weight tensor" + "s" * (count != 1), shown, in_ascii)
    if gone := [column.heading for column in columns if column not in shown]:
        yield Text(f"{', '.join(gone)}: not shown in a console of {options.max_width} characters\n", style="dim")
    yield from _titled("sizes of the parameters in MiB (overhead: scales, zero points and coded widths)", _size_columns(report), in_ascii)
    if report.skipped:
        yield from _titled("not quantized", _skipped_columns(report), in_ascii)
    yield from map(Text, summary_lines(report))


def _titled(title: str, columns: Sequence[_Column], in_ascii: bool) -> Iterator[RenderableType]:
    """A title and its table. Cells are literal text: the names of weights may hold square brackets, which are markup to rich."""
    yield Text(title, style="bold")
    table = Table(box=_ASCII_BOX if in_ascii else box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        folds = column.left and column in (columns[0], columns[-1])
        table.add_column(
            Text(column.heading),
            justify="left" if column.left else "right",
            no_wrap=not folds,
            overflow="fold",
            min_width=min(column.width, _NARROWEST_NAME) if folds else None,
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    yield table
    yield Text()


def _columns_that_fit(columns: list[_Column], width: int) -> list[_Column]:
    """The first column can be folded, and counts with the least that it needs."""
    shown = list(columns)

    def needed() -> int:
        return min(shown[0].width, _NARROWEST_NAME) + sum(column.width for column in shown[1:]) + _GAP * len(shown)

    for column in sorted((each for each in columns if each.goes), key=lambda each: -each.goes):
        if needed() > width:
            shown.remove(column)
    return shown


def _weight_columns(report: BitsNumbers, in_ascii: bool) -> list[_Column]:
    """One row per quantized weight; the histogram in numbers, or in block characters from the model's smallest width to its largest."""
    weights = report.weights
    show = _mib_format(report)
    widths = range(min(report.histogram), max(report.histogram) + 1)
    shares = [{width: count / weight.numel for width, count in weight.histogram.items()} for weight in weights]
    if in_ascii:
        histogram = _Column("share of each width", [" ".join(f"{b}:{percent(each[b])}" for b in each) for each in shares], left=True)
    else:
        histogram = _Column(f"{widths[0]}..{widths[-1]} bits", [_sparkline(each, widths) for each in shares], left=True)
    return [
        _Column("weight", [" = ".join((weight.name, *weight.aliases)) for weight in weights], left=True),
        _Column("shape", ["x".join(map(str, weight.shape)) for weight in weights], left=True, goes=4),
        _Column("read by", [weight.consumer for weight in weights], left=True, goes=5),
        _Column("weights", [str(weight.numel) for weight in weights]),
        _Column("bits", [f"{weight.average_bits:.2f}" for weight in weights]),
        _Column("range", [f"{weight.min_bits}-{weight.max_bits}" for weight in weights], goes=2),
        histogram,
        _Column("levels MiB", [show(weight.payload_bits) for weight in weights]),
        _Column("overhead MiB", [show(weight.overhead_bits) for weight in weights], goes=3),
        _Column("in ONNX", [f"{weight.container_bits} bits" for weight in weights], goes=1),
        _Column("ONNX MiB", [show(weight.container_payload_bits + weight.container_scale_bits) for weight in weights]),
        _Column("float MiB", [show(weight.float_bits) for weight in weights], goes=6),
    ]


def _size_columns(report: BitsNumbers) -> list[_Column]:
    """The three sizes of the model, each in its parts."""
    show = _mib_format(report)
    sizes = named_sizes(report).values()
    return [
        _Column("size", list(named_sizes(report)), left=True),
        _Column("levels", [show(size.levels_bits) for size in sizes]),
        _Column("overhead", [show(size.overhead_bits) for size in sizes]),
        _Column("not quantized", [show(size.rest_bits) for size in sizes]),
        _Column("total", [show(size.total_bits) for size in sizes]),
        _Column("of float", [f"1/{report.float_size.total_mib / size.total_mib:.2f}" for size in sizes]),
    ]


def named_sizes(report: BitsNumbers) -> dict[str, SizeParts]:
    """The three sizes by what to call them."""
    return {"bit-packed (exact)": report.packed_size, "ONNX (estimate)": report.container_size, "float": report.float_size}


def skipped_by_reason(report: BitsNumbers) -> dict[str, list[str]]:
    """Why parameters stay in float -> their names and shapes."""
    by_reason: dict[str, list[str]] = {}
    for each in report.skipped:
        shape = "x".join(map(str, each.shape)) or "scalar"
        by_reason.setdefault(each.reason, []).append(f"{each.name} ({shape})")
    return by_reason


def first_names(names: Sequence[str]) -> str:
    """Names in a row, the first few of many."""
    return ", ".join(names[:_NAMES_SHOWN]) + (f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def _skipped_columns(report: BitsNumbers) -> list[_Column]:
    """The parameters that stay in float, by reason."""
    by_reason = skipped_by_reason(report)
    return [
        _Column("stays in float because", list(by_reason), left=True),
        _Column("parameters", [str(len(names)) for names in by_reason.values()]),
        _Column("names", [first_names(names) for names in by_reason.values()], left=True),
    ]


def summary_lines(report: BitsNumbers) -> Iterator[str]:
    """What holds for the whole model, a line each."""
    yield (
        f"{report.average_bits:.3f} bits per quantized weight, {report.average_bits_in_all:.3f} with scales and coded widths; "
        f"{report.packed_size.total_mib:.4g} MiB bit-packed, {report.compression_ratio:.2f} times smaller than float"
    )
    grids = Counter(weight.grid for weight in report.weights)
    yield f"grid: {', '.join(grid if len(grids) == 1 else f'{grid} ({count})' for grid, count in grids.items())}"
    if mib(report.buffer_bits) >= _LARGE_BUFFERS_MIB:
        yield f"buffers: {mib(report.buffer_bits):.4g} MiB beside the parameters (statistics, tables of indices), in none of the sizes"
    if report.target:
        yield f"target: {report.target}"
    elif report.penalty is None:
        yield "target: none"
    if report.allocation:
        yield f"widths: {report.allocation}"
    if report.lambda_per_bit is not None:
        yield f"lambda: {report.lambda_per_mib:.4g} loss per MiB, {report.lambda_per_bit:.4g} loss per bit"
    yield f"scope: {report.scope}" + (f" ({report.scope_reason})" if report.scope_reason else "")
    for note in report.notes:
        yield f"note: {note}"


def _mib_format(report: BitsNumbers) -> Callable[[int], str]:
    """Bits as MiB with one number of decimals for the whole report: enough to see its smallest weights."""
    decimals = 4 if report.float_size.total_mib >= 1 else 6
    return lambda bits: f"{mib(bits):.{decimals}f}"


def percent(share: float) -> str:
    """A share of 0 to 1 in whole percent.

    Example:
        >>> percent(0.254), percent(0.004)
        ('25%', '<1%')
    """
    return "<1%" if share < 0.01 else f"{100 * share:.0f}%"


def _sparkline(shares: dict[int, float], widths: range) -> str:
    """One character per width, as high as the share of the weights that have it; a dot for none."""
    return "".join(_BLOCKS[math.ceil(shares[width] * len(_BLOCKS)) - 1] if width in shares else "·" for width in widths)
