"""``diffq-fx bench``: two ONNX files against each other in onnxruntime."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from diffq_fx.cli.output import Answer, add_row, command, new_table

if TYPE_CHECKING:
    from diffq_fx.export.onnx.benchmark import LatencyComparison


@command
def bench(
    a: Annotated[Path, typer.Argument(metavar="A.onnx", help="The reference, usually float.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B.onnx", help="The model to compare with it.", show_default=False)],
    batch: Annotated[int, typer.Option(help="Size of open first dimensions.")] = 1,
    repeats: Annotated[int, typer.Option(help="Pairs of runs to time.")] = 100,
    threads: Annotated[int, typer.Option(help="Threads inside an operator; 0 leaves it to onnxruntime.")] = 0,
    dim: Annotated[list[str] | None, typer.Option(help="NAME=SIZE of another open dimension; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
) -> Answer:
    """Run two ONNX files in turns on the same random inputs: latency, ratio, size, difference of the outputs."""
    from diffq_fx.export.onnx.benchmark import compare_latency

    dims = _parse_dims(dim or [])
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("timing in turns", total=repeats)
        comparison = compare_latency(
            a,
            b,
            batch=batch,
            repeats=repeats,
            threads=threads,
            seed=seed,
            dims=dims,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return Answer(comparison.to_dict(), [_table(comparison), *_summary(comparison)])


def _parse_dims(entries: list[str]) -> dict[str, int]:
    dims: dict[str, int] = {}
    for entry in entries:
        name, _, size = entry.rpartition("=")
        if not name or not size.strip().isdecimal():
            raise ValueError(f"--dim takes NAME=SIZE, such as length=128, got '{entry}'.")
        dims[name.strip()] = int(size)
    return dims


def _table(comparison: "LatencyComparison") -> Table:
    table = new_table("latency of one run: median [q1, q3]", folded=("model", "file"), right=("latency ms", "size MiB"))
    add_row(table, "A", comparison.path_a, comparison.a_ms.text(".4f"), f"{comparison.size_a_mib:.4f}")
    add_row(table, "B", comparison.path_b, comparison.b_ms.text(".4f"), f"{comparison.size_b_mib:.4f}", end_section=True)
    size_ratio = f"{comparison.size_a_mib / comparison.size_b_mib:.2f}"
    add_row(table, "A / B", "", comparison.ratio.text(".2f"), size_ratio, style="bold")
    return table


def _summary(comparison: "LatencyComparison") -> list[str]:
    worst = comparison.worst_output
    inputs = ", ".join(f"{name} {kind} {list(shape)}" for name, (kind, shape) in comparison.inputs.items())
    threads = comparison.threads or "onnxruntime's choice"
    return [
        *filter(None, [comparison.pairing]),
        f"outputs: differ by at most {worst.max_abs:.3g} ({100 * worst.max_relative:.3g} % of A's largest value), worst in '{worst.name}'",
        f"inputs: {inputs}; threads: {threads}; {comparison.repeats} pairs in turns, seed {comparison.seed}",
    ]
