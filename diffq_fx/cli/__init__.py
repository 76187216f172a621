"""The ``diffq-fx`` command line: look into files, report on them, pack and unpack state dicts, race two ONNX files, see the demo.

Commands import onnx and onnxruntime when they run, so that ``diffq-fx --help`` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from diffq_fx.cli.bench import bench
from diffq_fx.cli.inspect import inspect
from diffq_fx.cli.output import errors_as_messages
from diffq_fx.cli.packed import pack, unpack
from diffq_fx.cli.report import report

__all__ = ["app", "main"]

app = typer.Typer(
    name="diffq-fx",
    help="Learned mixed-precision compression of PyTorch models: smaller and faster ONNX files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(inspect)
app.command()(pack)
app.command()(unpack)
app.command()(bench)
app.command()(report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files and the picture.")] = Path("diffq-fx-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer epochs: see it work, not its accuracy.")] = False,
) -> None:
    """Train small models on real data, compress them, export them to ONNX and race them against float."""
    with errors_as_messages():
        from diffq_fx.demo import run

        run(out=out, quick=quick)


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="diffq-fx")
