"""Memory of a process that trains ten thousand steps, saves, loads and converts on the way: it must not grow.

The resident size is read after every twentieth of the steps; the first tenth, in which torch fills its caches, does not count.
"""

import argparse
import copy
import gc
import re
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, bits_report, convert, model_size, prepare_diffq
from diffq_fx.export import load_packed, save_packed

POINTS = 20
MOST_MIB = 8.0


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
    rows, grown = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in ways.items():
            curve = train(config, steps, Path(folder))
            grown[name] = curve[-1] - curve[POINTS // 10 - 1]
            rows.append([name, *(f"{curve[place]:.1f}" for place in range(POINTS // 10 - 1, POINTS, POINTS // 10)), f"{grown[name]:+.1f}"])
    header = ("MiB after steps", *(f"{steps * tenth // 10:,}" for tenth in range(1, 11)), "grown since the first tenth")
    print(write_result("memory_growth", f"Memory over {steps:,} steps", markdown_table(header, rows), ["torch"]).read_text())
    if max(grown.values()) > MOST_MIB:
        raise SystemExit(f"the memory grew by {max(grown.values()):.1f} MiB")


if __name__ == "__main__":
    main()
