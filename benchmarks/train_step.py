"""What training with noise costs: whole steps, the transform alone, eval, and memory, interleaved with the peers.

    python -m benchmarks.train_step --part transform     # the noise, forward and backward, over the weights alone
    python -m benchmarks.train_step --part kernels       # the ways to make the noise that were weighed
    python -m benchmarks.train_step --part variants      # each kernel in C in each variant that the processor can run
    python -m benchmarks.train_step --part eval          # forward in eval(), after the first
    python -m benchmarks.train_step --part memory        # peak memory of training steps
    python -m benchmarks.train_step --part size          # size and pressure on the bits of 300 weights
    python -m benchmarks.train_step --part compile       # CPU seconds of torch.compile on BERT-base's shape; --quick: 2 layers
    python -m benchmarks.train_step --part growth        # prepare, one transform, convert from 1 M to 300 M weights
    python -m benchmarks.train_step --part step          # whole training steps; with --seconds 100 a part of them at each call

Two systems of a table run in turns in one process; a cell is the median of the pairwise ratios to the plain step and, in brackets, the
middle half of them.
"""

import argparse
import copy
import datetime
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._result import RESULTS, markdown_table, write_result
from benchmarks._train_systems import SYSTEMS, interleaved, pair, quartiles, ratio, tasks
from diffq_fx import prepare_diffq
from diffq_fx.methods.base import WeightQuantizer

PACKAGES = ("torch", "diffq", "torchao", "brevitas")
PARTS = ("step", "transform", "kernels", "variants", "eval", "memory", "growth", "size", "compile")


def part_eval(quick: bool) -> str:
    """Forward in eval() without gradients, after the first, which rounds."""
    rows = []
    for name, (make, inputs, _, rounds) in tasks(quick).items():
        if name.endswith(("batch 128", "64 x 128")):
            continue  # the smaller batch shows an overhead better
        torch.manual_seed(0)
        plain = make().eval()
        prepared = prepare_diffq(copy.deepcopy(plain), inputs[:1]).eval()

        @torch.no_grad()
        def forward(model: torch.nn.Module, inputs: Tensor = inputs) -> None:
            model(inputs)

        steps = {"plain": lambda model=plain: forward(model), "ours": lambda model=prepared: forward(model)}
        seconds = interleaved(steps, 4 * rounds, warm_up=3)
        faults = [str(_page_faults(step)) for step in steps.values()]
        checks = statistics.median(_seconds_of_checks(prepared) for _ in range(9)) / statistics.median(seconds["plain"])
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(seconds['plain']):.1f}",
                ratio(seconds["ours"], seconds["plain"]),
                f"{100 * checks:.1f} %",
                *faults,
            ]
        )
    header = (
        "eval forward, after the first",
        "plain, ms",
        "ours over plain",
        "the checks for changed values alone",
        "page faults, plain",
        "page faults, ours",
    )
    malloc = os.environ.get("MALLOC_TRIM_THRESHOLD_")
    note = f"\n\nWith MALLOC_TRIM_THRESHOLD_={malloc}: the process keeps what is freed." if malloc else ""
    return markdown_table(header, rows) + note


@torch.no_grad()
def _seconds_of_checks(prepared: torch.nn.Module) -> float:
    """Every kept weight asked for once, as a forward does it."""
    quantizers = [module for module in prepared.modules() if isinstance(module, WeightQuantizer)]
    start = time.perf_counter()
    for quantizer in quantizers:
        quantizer(quantizer.weight)
    return time.perf_counter() - start


def _page_faults(step: Callable[[], None], rounds: int = 5) -> int:
    """How often a call has to fetch a page of memory from the system."""
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // rounds


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def part_step(quick: bool, wanted: str, task: str, seconds: float) -> None:
    """Whole steps: each task with each system is one piece, kept as a line of the jsonl file; those that are there are not run again."""
    path = RESULTS / f"train_step_cpu{os.cpu_count()}.jsonl"
    begin = time.perf_counter()
    for system in SYSTEMS:
        for name, (make, inputs, loss_of, rounds) in tasks(quick).items():
            done = any((record["task"], record["system"]) == (name, system) for record in _records(path))
            if done or wanted not in system or task not in name or time.perf_counter() - begin > seconds:
                continue
            found = interleaved(pair(make, inputs, loss_of, system), rounds, warm_up=2)
            record = {"task": name, "system": system, "date": str(datetime.date.today()), "plain": found["plain"], "seconds": found[system]}
            RESULTS.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(name, system, ratio(found[system], found["plain"]), flush=True)
    report_steps(_records(path))


def report_steps(records: list[dict]) -> None:
    """Table and picture of the pieces that are there."""
    cells = {(r["task"], r["system"]): quartiles(r["seconds"], r["plain"]) for r in records}
    names = [name for name in tasks() if any(name == task for task, _ in cells)]
    plain = {name: statistics.median(t for r in records if r["task"] == name for t in r["plain"]) for name in names}
    rounds = {system: sorted({len(r["seconds"]) for r in records if r["system"] == system}) for system in SYSTEMS}
    rows = [["plain", *(f"1 ({plain[name]:.2f} s)" for name in names), ""]]
    for system in SYSTEMS:
        found = [cells.get((name, system)) for name in names]
        shown = ("" if cell is None else f"{cell[1]:.3f} [{cell[0]:.3f}, {cell[2]:.3f}]" for cell in found)
        rows.append([system, *shown, ", ".join(map(str, rounds[system]))])
    table = markdown_table(["", *names, "rounds"], rows)
    body = f"Step time over the plain step, each system in turns with a plain step of its own.\n\n{table}"
    command = "python -m benchmarks.train_step --part step"
    path = write_result("train_step", "Training with noise: step", body, PACKAGES, command=command)
    _plot_steps(cells, names, path.with_suffix(".png"))
    print(path.read_text())


def _plot_steps(cells: dict[tuple[str, str], tuple[float, float, float]], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3.4), sharey=True, squeeze=False)
    systems = list(SYSTEMS)[::-1]
    for axis, name in zip(axes[0], names, strict=True):
        for place, system in enumerate(systems):
            if (name, system) in cells:
                q1, median, q3 = cells[name, system]
                colour = "tab:blue" if system.startswith("ours") else "tab:gray"
                axis.barh(place, median - 1, left=1, color=colour, xerr=[[median - q1], [q3 - median]], error_kw={"capsize": 2})
        axis.axvline(1, color="k", linewidth=1)
        axis.set(title=name, xlabel="step / plain step")
        axis.set_yticks(range(len(systems)), systems)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run one part and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--systems", default="", help="only those with this in their name; for --part step")
    parser.add_argument("--task", default="", help="only those with this in their name; for --part step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no new piece after this time; for --part step")
    arguments = parser.parse_args()
    part = arguments.part
    if part == "step":
        part_step(arguments.quick, arguments.systems, arguments.task, arguments.seconds)
        return
    rows: list[list[str]] = []
    if part == "growth":
        from benchmarks._train_growth import HEADER, growth, plot

        rows = growth(arguments.quick)
        body = markdown_table(HEADER, rows)
    elif part == "memory":
        from benchmarks._train_growth import memory

        body = memory(arguments.quick)
    elif part == "eval":
        body = part_eval(arguments.quick)
    elif part == "variants":
        from benchmarks._train_variants import part_variants

        body = part_variants(arguments.quick)
    elif part == "size":
        from benchmarks._train_size import part_size

        body = part_size(arguments.quick)
    elif part == "compile":
        from benchmarks._train_compile import part_compile

        body = part_compile(arguments.quick)
    else:
        from benchmarks._train_transform import part_kernels, part_transform

        body = {"transform": part_transform, "kernels": part_kernels}[part](arguments.quick)
    kernels = os.environ.get("DIFFQ_FX_KERNELS", "native")
    name = f"train_{part}" + ("" if kernels == "native" else f"_{kernels}")
    name += "_untrimmed" if os.environ.get("MALLOC_TRIM_THRESHOLD_") else ""
    path = write_result(
        name, f"Training with noise: {part}", body, {"variants": ("torch",), "compile": ("torch", "transformers")}.get(part, PACKAGES)
    )
    if rows:
        plot(rows, path.with_suffix(".png"))
    print(path.read_text())


if __name__ == "__main__":
    main()
