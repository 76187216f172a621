"""Memory of a process that trains ten thousand steps, or prepares, converts, packs, exports, loads or compresses again and again.

The resident size is read after every twentieth; the first tenth, in which torch fills its caches, does not count. Loading is done ten
thousand times; ``--steps`` scales all. torch itself keeps the sizes of each trace with a dynamic one: what its own export of the float
model grows by is taken off.
"""

import argparse
import contextlib
import copy
import gc
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, DiffQError, bits_report, compress, convert, model_size, prepare, prepare_diffq
from diffq_fx.export import export_onnx, load_packed, save_packed
from diffq_fx.methods import STE

POINTS = 20
MOST_MIB = 8.0
TORCH_EXPORT = "torch.onnx.export of the float model"


def resident_mib() -> float:
    """The process's memory as the system counts it."""
    gc.collect()
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def train(config: DiffQConfig, steps: int, folder: Path) -> list[float]:
    """Memory after each twentieth of a training, which also looks at its size, evaluates, and writes and reads a file."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model = prepare_diffq(model, torch.randn(2, 64), config)
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(16, 64)), torch.randint(10, (16,)))
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            model.compression.log(loss=loss)
        if (step + 1) % (steps // POINTS) == 0:
            model.eval()(torch.randn(16, 64))
            model_size(model, exact=True)
            bits_report(model).as_dict()
            load_packed(save_packed(convert(copy.deepcopy(model)), folder / "m"))
            model.train()
            found.append(resident_mib())
    return found


def small_net() -> nn.Module:
    """A float model."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def repeat(work: Callable[[Path], object], times: int, folder: Path) -> list[float]:
    """Memory after each twentieth of so many calls."""
    found = []
    for turn in range(times):
        work(folder)
        if (turn + 1) % max(times // POINTS, 1) == 0:
            found.append(resident_mib())
    return found[:POINTS]


def works(folder: Path) -> dict[str, tuple[Callable[[Path], object], float]]:
    """Name -> what is done again and again, and how often for each step of a training."""
    x = torch.randn(2, 64)
    converted, bad = convert(prepare(small_net(), x, STE(bits=4))), b"0" * 1000

    def refused(folder: Path) -> None:
        (folder / "bad").write_bytes(bad)
        with contextlib.suppress(DiffQError):
            load_packed(folder / "bad")

    packed = save_packed(converted, folder / "packed")
    options = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: torch.export.Dim.AUTO},)}  # as our export has it
    return {
        "prepare, a step, convert": (lambda _: step_and_convert(prepare_diffq(small_net(), x)), 0.1),
        "save_packed": (lambda folder: save_packed(converted, folder / "m"), 0.5),
        "load_packed": (lambda _: load_packed(packed), 1),
        "load_packed into a model": (lambda _: load_packed(small_net(), packed), 1),
        "load_packed, refused": (refused, 1),
        "export_onnx": (lambda folder: export_onnx(converted, x, folder / "m.onnx"), 0.02),
        TORCH_EXPORT: (lambda folder: torch.onnx.export(small_net(), (x,), folder / "float.onnx", **options), 0.02),
        "compress": (lambda _: compress(small_net(), [torch.randn(8, 64)] * 4, steps=2, progress=False), 0.02),
    }


def step_and_convert(model: nn.Module) -> nn.Module:
    """One step of a prepared model, and its conversion."""
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    return convert(model)


def main() -> None:
    """Train in every way, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ways = {
        "noise to the end": DiffQConfig(penalty=0.1),
        "noise, then rounding": DiffQConfig(target_bits=4, training_steps=steps),
        "size of the packed file": DiffQConfig(target_bits=3, training_steps=steps, size_of="packed_file"),
    }
    rows, grown, counts = [], {}, dict.fromkeys(ways, steps)
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: lambda config=config: train(config, steps, Path(folder)) for name, config in ways.items()}
        for name, (work, share) in works(Path(folder)).items():
            times = counts[name] = max(int(steps * share), POINTS)
            curves[name] = lambda work=work, times=times: repeat(work, times, Path(folder))
        for name, measure in curves.items():
            curve = measure()
            grown[name] = curve[-1] - curve[POINTS // 10 - 1]
            rows.append(
                [
                    name,
                    f"{counts[name]:,}",
                    *(f"{curve[place]:.1f}" for place in range(POINTS // 10 - 1, POINTS, POINTS // 10)),
                    f"{grown[name]:+.1f}",
                ]
            )
    grown["export_onnx"] -= grown.pop(TORCH_EXPORT)
    header = ("MiB after tenths", "times", *map(str, range(1, 11)), "grown since the first tenth")
    print(write_result("memory_growth", f"Memory over {steps:,} steps", markdown_table(header, rows), ["torch"]).read_text())
    if max(grown.values()) > MOST_MIB:
        raise SystemExit(f"the memory grew by {max(grown.values()):.1f} MiB")


if __name__ == "__main__":
    main()
