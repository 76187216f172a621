"""What the commands share: an answer for people or as JSON, errors as one message, sizes in MiB."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from json import dumps
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from diffq_fx.errors import DiffQError, visible

MIB = 2**20
_PIPE_WIDTH = 160
_EXTRAS = {"sklearn": "demo", "transformers": "transformers", "torchao": "torchao"}
"""A module that may be missing -> the extra that brings it."""
BAD_INPUT, INTERRUPTED = 2, 130
EXIT_CODES = "Exit codes: 0 done; 2 wrong arguments or input, said in one message; 130 interrupted; 1 an error of diffq-fx itself."


@dataclass(frozen=True)
class Answer:
    """What a command has found or done."""

    data: Mapping[str, Any]
    """For ``--json``."""
    shown: Sequence[RenderableType]
    """For people: tables and lines; a line is taken literally."""
    failed: str = ""
    """What could not be done of it: the last message, with the exit code of bad input."""


def command(work: Callable[..., Answer]) -> Callable[..., None]:
    """A command of the line: its answer for people or, with ``--json``, as JSON that is alone on stdout; its errors as one message."""

    @wraps(work)
    def run(*, json: bool, **given: Any) -> None:
        with errors_as_messages(), redirect_stdout(sys.stderr) if json else nullcontext():  # a user's model may print
            answer = work(**given)
        if json:
            typer.echo(dumps(_finite(answer.data), indent=2, allow_nan=False))
        else:
            console = Console(highlight=False)
            if not console.is_terminal:
                console.width = _PIPE_WIDTH
            for each in answer.shown:
                console.print(visible(each) if isinstance(each, str) else each, markup=False, soft_wrap=isinstance(each, str))
        if answer.failed:
            _fail(answer.failed)

    option = Annotated[bool, typer.Option("--json", help="Print everything as JSON, alone on stdout.")]
    signature = inspect.signature(work)
    parameter = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
    run.__dict__["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), parameter])
    run.__annotations__ = {**work.__annotations__, "json": option}
    return run


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print the errors that a user can do something about as one message on stderr and leave with the code for them."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        how = f": pip install 'diffq-fx[{_EXTRAS[package]}]'" if package in _EXTRAS else ""
        _fail(f"this command needs the module '{error.name}', which is not installed{how}.", error)
    except (DiffQError, ValueError, OSError, ImportError) as error:
        _fail(str(error), error)
    except KeyboardInterrupt as error:
        _fail("interrupted.", error, INTERRUPTED)


def _fail(message: str, cause: BaseException | None = None, code: int = BAD_INPUT) -> None:
    Console(stderr=True).print(visible(f"diffq-fx: {message}"), style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code) from cause


def new_table(title: str, *, folded: Sequence[str] = (), left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """An empty table. Its title is taken literally, square brackets included; columns to fold come first, then those of one line."""
    table = Table(title=Text(visible(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in folded:
        table.add_column(heading, overflow="fold")
    for heading in (*left, *right):
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=True)
    return table


def add_row(table: Table, *cells: str, style: str | None = None, end_section: bool = False) -> None:
    """Add a row of literal text: names in a file may hold square brackets, which are markup to rich, or commands to the terminal."""
    table.add_row(*(Text(visible(cell)) for cell in cells), style=style, end_section=end_section)


def mib(size_bytes: int | None) -> str:
    """Bytes as MiB with four decimals, and "-" for an unknown size.

    Example:
        >>> mib(1536 * 1024), mib(None)
        ('1.5000', '-')
    """
    return "-" if size_bytes is None else f"{size_bytes / MIB:.4f}"


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


def _finite(value: Any) -> Any:
    """Plain data with text for infinite and undefined numbers, which not every reader of JSON takes."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
