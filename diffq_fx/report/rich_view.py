"""The report as rich tables that fit the console: where it is narrow, the less important columns go, never a row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from diffq_fx.report.tables import TextTable, size_table, skipped_table, summary_lines, weight_table

if TYPE_CHECKING:
    from diffq_fx.report.bits_report import BitsReport

_GAP = 3
_NARROWEST_NAME = 24


class RichReport:
    """What ``rich.print`` shows of a report."""

    def __init__(self, report: "BitsReport") -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The tables, cut to the width of the console."""
        weights = weight_table(self.report, blocks=not options.ascii_only)
        shown = _columns_that_fit(weights, options.max_width)
        yield _rich_table(weights, shown)
        gone = [column.heading for index, column in enumerate(weights.columns) if index not in shown]
        if gone:
            yield Text(f"{', '.join(gone)}: not shown in a console of {options.max_width} characters\n", style="dim")
        for table in (size_table(self.report), skipped_table(self.report)):
            if table.rows:
                yield _rich_table(table, range(len(table.columns)))
        for line in summary_lines(self.report):
            yield Text(line)


def _columns_that_fit(table: TextTable, width: int) -> list[int]:
    """Indices of the columns to show; the first, which can be folded, counts with the least that it needs."""
    needs = [max(len(column.heading), *(len(row[i]) for row in table.rows)) + _GAP for i, column in enumerate(table.columns)]
    needs[0] = min(needs[0], _NARROWEST_NAME + _GAP)
    shown = list(range(len(table.columns)))
    order = sorted((i for i in shown if table.columns[i].goes), key=lambda i: -table.columns[i].goes)
    while order and sum(needs[i] for i in shown) > width:
        shown.remove(order.pop(0))
    return shown


def _rich_table(table: TextTable, shown: Sequence[int]) -> Table:
    """Cells are literal text: the names of weights may hold square brackets, which are markup to rich."""
    made = Table(title=Text(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index in shown:
        column = table.columns[index]
        folds = column.left and index in (0, len(table.columns) - 1)
        longest = max(len(column.heading), *(len(row[index]) for row in table.rows))
        made.add_column(
            Text(column.heading),
            justify="left" if column.left else "right",
            no_wrap=not folds,
            overflow="fold",
            min_width=min(longest, _NARROWEST_NAME) if folds else None,
        )
    for row in table.rows:
        made.add_row(*(Text(row[index]) for index in shown))
    return made
