"""``diffq-fx demo``: train, compress, export and race two small models."""

from pathlib import Path
from typing import Annotated

import typer

from diffq_fx.cli.output import errors_as_messages


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files and the picture.")] = Path("diffq-fx-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer epochs: see it work, not its accuracy.")] = False,
) -> None:
    """Train small models on real data, compress them, export them to ONNX and race them against float."""
    with errors_as_messages():
        from diffq_fx.demo import run

        run(out=out, quick=quick)
