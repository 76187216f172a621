"""How time and memory of prepare, one transform and convert grow with the model; what memory training takes."""

import multiprocessing
import resource
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks._result import markdown_table
from benchmarks._train_systems import SYSTEMS, tasks, training_step
from diffq_fx import convert_diffq, prepare_diffq

HEADER = (
    "million weights",
    "float MiB",
    "prepare s",
    "peak during prepare / float",
    "one transform s",
    "convert s",
    "peak during convert / float",
)


def growth(quick: bool) -> list[list[str]]:
    """The row of each size, each in a process of its own, so that its peak memory is its own."""
    rows = []
    for millions in (1, 10, 100) if quick else (1, 3, 10, 30, 100, 300):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(_grow, (millions,)))
        print(rows[-1], flush=True)
    return rows


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _grow(millions: int) -> list[str]:
    side = 1000
    warnings.simplefilter("ignore")
    prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64))  # what is loaded once
    before = _peak_mib()
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(millions)))
    size = millions * side * side * 4 / 2**20
    begin = time.perf_counter()
    prepared = prepare_diffq(model, torch.zeros(1, side))
    prepare_seconds, prepare_peak = time.perf_counter() - begin, _peak_mib() - before
    begin = time.perf_counter()
    with torch.no_grad():
        for quantizer in prepared.train().compression.quantizers:
            quantizer(prepared.get_parameter(quantizer.spec.name))
    transform_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    convert_diffq(prepared)
    convert_seconds, convert_peak = time.perf_counter() - begin, _peak_mib() - before
    peaks = (prepare_peak / size, convert_peak / size)
    return [
        str(millions),
        f"{size:.0f}",
        f"{prepare_seconds:.2f}",
        f"{peaks[0]:.2f}",
        f"{transform_seconds:.2f}",
        f"{convert_seconds:.2f}",
        f"{peaks[1]:.2f}",
    ]


def memory(quick: bool) -> str:
    """Peak memory of training steps, each system in a process of its own, over that of plain steps."""
    systems = ["plain", *(system for system in SYSTEMS if "g=1" not in system)][: 5 if quick else None]
    peaks = {}
    for system in systems:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[system], weights = pool.apply(_train, (system,))
        print(system, f"{peaks[system]:.0f} MiB", flush=True)
    rows = [[name, f"{peak:.0f}", f"{(peak - peaks['plain']) * 2**20 / weights:.2f}"] for name, peak in peaks.items()]
    return markdown_table((f"{_MEMORY_TASK}, {weights / 1e6:.1f} M weights", "peak, MiB", "extra bytes per weight"), rows)


_MEMORY_TASK = "6-layer LM, 8 x 128"


def _train(system: str) -> tuple[float, int]:
    """Peak memory in MiB of a few steps, and the number of weights."""
    warnings.simplefilter("ignore")
    prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64))  # what is loaded once
    make, inputs, loss_of, _ = tasks()[_MEMORY_TASK]
    torch.manual_seed(0)
    model = make()
    weights = sum(p.numel() for p in model.parameters())
    step = training_step(model, inputs, loss_of) if system == "plain" else SYSTEMS[system](model, inputs, loss_of)
    for _ in range(4):
        step()
    return _peak_mib(), weights


def plot(rows: list[list[str]], path: Path) -> None:
    """Seconds and memory over the number of weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = list(zip(*[[float(cell) for cell in row] for row in rows], strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, column in (("prepare", 2), ("one transform", 4), ("convert", 5)):
        left.loglog(columns[0], columns[column], "o-", label=name)
    left.loglog(columns[0], [columns[5][-1] * n / columns[0][-1] for n in columns[0]], "k:", linewidth=1, label="linear")
    left.set(xlabel="million weights", ylabel="seconds")
    for name, column in (("prepare", 3), ("convert", 6)):
        right.semilogx(columns[0], columns[column], "o-", label=name)
    right.axhline(1, color="k", linestyle=":", linewidth=1)
    right.set(xlabel="million weights", ylabel="peak memory / float model", ylim=(0, min(4, max(columns[6]) * 1.1)))
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
