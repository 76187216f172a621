"""The ``diffq-fx`` command line: look into files, pack and unpack state dicts, race two ONNX files, see the demo.

Commands import torch, onnx and onnxruntime when they run, so that ``diffq-fx --help`` answers at once.
"""

import typer

from diffq_fx.cli.bench import bench
from diffq_fx.cli.demo import demo
from diffq_fx.cli.inspect import inspect
from diffq_fx.cli.packed import pack, unpack

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
app.command()(demo)


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="diffq-fx")
