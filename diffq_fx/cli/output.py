"""What the commands share: errors as one message, sizes in MiB, JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffq_fx.errors import DiffQError

_MIB = 2**20
_PIPE_WIDTH = 160


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print the errors that a user can do something about as one message on stderr and leave with code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"this command needs the module '{error.name}', which is not installed.", error)
    except (DiffQError, ValueError, OSError) as error:
        _fail(str(error), error)


def _fail(message: str, cause: Exception) -> None:
    Console(stderr=True).print(f"diffq-fx: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2) from cause


def standard_output() -> Console:
    """A console for tables; wide where nobody looks at it through a window."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def new_table(title: str, *, folded: Sequence[str] = (), left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """An empty table. Its title is taken literally, square brackets included; columns to fold come first, then those of one line."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in folded:
        table.add_column(heading, overflow="fold")
    for heading in (*left, *right):
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=True)
    return table


def add_row(table: Table, *cells: str, style: str | None = None, end_section: bool = False) -> None:
    """Add a row of literal text: names in a file may hold square brackets, which are markup to rich."""
    table.add_row(*(Text(cell) for cell in cells), style=style, end_section=end_section)


def mib(size_bytes: int | None) -> str:
    """Bytes as MiB with four decimals, and "-" for an unknown size.

    Example:
        >>> mib(1536 * 1024), mib(None)
        ('1.5000', '-')
    """
    return "-" if size_bytes is None else f"{size_bytes / _MIB:.4f}"


def mean_and_range(histogram: dict[int, int] | None) -> str:
    """Mean of the learned bits, and their range; "-" where none are known.

    Example:
        >>> mean_and_range({2: 1, 4: 3})
        '3.50 (2-4)'
    """
    if not histogram:
        return "-"
    mean = sum(bits * count for bits, count in histogram.items()) / max(sum(histogram.values()), 1)
    return f"{mean:.2f} ({min(histogram)}-{max(histogram)})"


def print_json(value: dict[str, Any]) -> None:
    """Print plain data as JSON that every reader takes: infinite and undefined numbers become text."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
