"""The ``diffq-fx`` command line.

Commands import onnx and onnxruntime when they run, so that ``diffq-fx --help`` answers at once.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from diffq_fx.cli.bench import bench
from diffq_fx.cli.compress_command import compress
from diffq_fx.cli.inspect import inspect
from diffq_fx.cli.output import EXIT_CODES, Answer, command
from diffq_fx.cli.packed import pack, unpack
from diffq_fx.cli.report import report

__all__ = ["app"]

app = typer.Typer(
    name="diffq-fx",
    no_args_is_help=True,
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(compress)
app.command()(inspect)
app.command()(pack)
app.command()(unpack)
app.command()(bench)
app.command()(report)


def _print_version(wanted: bool) -> None:
    if wanted:
        from diffq_fx import __version__

        typer.echo(f"diffq-fx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version of diffq-fx and leave.")
    ] = False,
) -> None:
    """Learned mixed-precision compression of PyTorch models: smaller and faster ONNX files."""


@app.command()
@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files and the report page.")] = Path("diffq-fx-demo"),
    small: Annotated[bool, typer.Option("--small", help="A small net, trained from scratch: needs no model.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few steps: see it work, not its accuracy.")] = False,
) -> Answer:
    """Compress MiniLM to an eighth, export it to ONNX and race it against float and onnxruntime's own quantizers."""
    from diffq_fx.demo import run

    run(out=out, quick=quick, small=small)
    return Answer({"folder": str(out), "results": json.loads((out / "results.json").read_text())}, ())
