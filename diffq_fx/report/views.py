"""The report: its numbers as text, tables, picture and page, each of which is imported when it is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from diffq_fx.arguments import as_path
from diffq_fx.atomic import replaced_atomically
from diffq_fx.errors import DiffQError
from diffq_fx.report.numbers import BitsNumbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderableType


@dataclass(frozen=True, kw_only=True)
class BitsReport(BitsNumbers):
    """The bits of a prepared or converted model; :func:`diffq_fx.bits_report` makes it.

    ``print(report)`` gives plain text, ``rich.print(report)`` tables, :meth:`as_dict` plain data, :meth:`save_picture` a picture,
    :meth:`save_page` a page for a browser.
    """

    def __str__(self) -> str:
        """Plain text, every weight in a line."""
        from diffq_fx.report.tables import plain_text

        return plain_text(self)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[RenderableType]":
        """Tables for ``rich.print``."""
        from diffq_fx.report.tables import report_tables

        return report_tables(self, options)

    def figure(self) -> "Figure":
        """A matplotlib Figure: the three sizes, and for every weight (beyond 80, every module) how many weights have which bits."""
        from diffq_fx.report.picture import draw

        return draw(self)

    def save_picture(self, path: str | Path) -> Path:
        """Save :meth:`figure`; needs no display, and an older file survives until the new one is complete.

        Args:
            path: its suffix decides the format: png, svg, pdf; png is added where there is none.

        Returns:
            The path that was written.

        Raises:
            ValueError: an unknown suffix.
            DiffQError: the path cannot be written.
        """
        path = as_path("save_picture", "path", path)
        path = path if path.suffix else path.with_suffix(".png")
        drawn = BytesIO()
        self.figure().savefig(drawn, format=path.suffix[1:].lower(), dpi=150)
        with replaced_atomically(path, DiffQError) as file:
            file.write(drawn.getvalue())
        return path

    def save_page(self, path: str | Path, *, measurements: Sequence[Mapping[str, object]] = ()) -> Path:
        """Save the report as one HTML page that needs no other file and no network.

        It has sizes, the bits of every weight beside its sensitivity, curves of the training, what stays in float and why.

        Args:
            path: the file to write; an older one survives until the new one is complete.
            measurements: what you measured, such as latency and accuracy, as rows of a table: heading -> text or number, the same
                headings in each, ``[{"file": "float.onnx", "ms": 9.7}, {"file": "model.onnx", "ms": 4.4}]``.

        Returns:
            The path that was written.

        Raises:
            ValueError: two rows of ``measurements`` have other headings.
            DiffQError: the path cannot be written.
        """
        from diffq_fx.report.page import page_of

        return page_of(self, measurements).save(path)
