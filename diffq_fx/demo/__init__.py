"""The main job, end to end: a float model is compressed, exported and raced against float and onnxruntime's quantizers.

``sentences`` compresses a pretrained model without labels, ``digits`` trains a small one, before and after ``prepare_diffq``.
"""

import time
from pathlib import Path

from rich.console import Console

from diffq_fx.demo.race import show


def run(*, out: Path, quick: bool = False, small: bool = False) -> None:
    """Compress a model, export it to ONNX, race it, print one table and write one report page.

    Args:
        out: folder for the ONNX files, ``report.html`` and ``results.json``; made if it is not there.
        quick: little data and few steps, to see it work and not its accuracy.
        small: a small net for digits, trained from scratch, in place of MiniLM, which is in a package of its own.

    Raises:
        DiffQError: the package with MiniLM is not installed.
    """
    if small:
        from diffq_fx.demo.digits import contest
    else:
        from diffq_fx.demo.sentences import contest
    console, began = Console(highlight=False), time.monotonic()

    def tell(text: str) -> None:
        console.print(f"{time.monotonic() - began:4.0f} s  {text}", soft_wrap=True)

    show(contest(out, quick, tell), out, console)
    tell(f"report.html, the ONNX files and results.json are in {out}")
