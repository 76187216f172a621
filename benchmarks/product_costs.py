"""What onnxruntime's kernels for products cost on this kind of processor: measure them, fit a profile for ``export_onnx(target=...)``.

    python -m benchmarks.product_costs measure             # under 6 minutes; goes on where it stopped
    python -m benchmarks.product_costs fit X86_AVX2        # the result file, and the profile as it stands in layout/profiles.py
    python -m benchmarks.product_costs fit X86_AVX2 --write    # puts it there

All forms of one product run in turns, one thread, as ``export_onnx(target="this-machine")`` runs them. The kind of processor is found
out and is part of the file names. The fit is least squares on relative errors with no cost below 0; the margin is the smallest at which no
form that is predicted to be faster was measured to be more than 3 % slower than float.
"""

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._kind import kind_title, processor_kind
from benchmarks._result import RESULTS, describe_machine, markdown_table, write_result
from diffq_fx.export.onnx.layout import profiles
from diffq_fx.export.onnx.layout.cost import FLOAT, Cost, Kernel, Product, Profile, choose, often_paid
from diffq_fx.export.onnx.timing import time_in_turns

SQUARES = [(size, size) for size in (32, 64, 128, 256, 512, 1024, 2048)]
SHAPES = [*SQUARES, (384, 1536), (1536, 384), (128, 1024), (1024, 128), (512, 2048), (2048, 512), (1024, 4096)]
ROWS = (1, 4, 16, 64, 256)
FUSED = [
    Kernel(name, block) for name, blocks in (("fused 2", (32, 128)), ("fused 4", (32, 256)), ("fused 8", (32, 256))) for block in blocks
]
KERNELS = (FLOAT, *FUSED, Kernel("dynamic int8"), Kernel("dynamic uint8"))
SECONDS_PER_CELL, TURNS = 3.0, 41
SLOWEST = 0.97
"""A form below this part of float's speed must not have been taken."""
MARGINS = tuple(float(margin) for margin in np.arange(1.05, 2.0, 0.01).round(2))
UNITS = (
    "us a call",
    "ns a weight",
    "ns a distant weight",
    "ns an input",
    "ns an output",
    "ps a product",
    "ns a scale",
    "ps a scale and row",
)


def measure(limit: float) -> None:
    """Time the cells that are missing, until the time is over."""
    from diffq_fx.export.onnx.measuring import prepare_run

    log = _log(processor_kind())
    known = {tuple(cell["shape"]) for cell in _read(log)}
    missing = [(rows, *shape) for rows in ROWS for shape in SHAPES if (rows, *shape) not in known]
    random.Random(0).shuffle(missing)  # so that what is there after a stop is not all of one size
    start = time.perf_counter()
    for done, shape in enumerate(missing):
        if time.perf_counter() - start > limit:
            print(f"{len(missing) - done} cells are left: run it again.")
            return
        runs = [prepare_run(kernel, Product(*shape), threads=1) for kernel in KERNELS]
        times = time_in_turns(runs, turns=TURNS, seconds=SECONDS_PER_CELL)
        cell = {
            "shape": shape,
            "turns": len(times[0]),
            "us": {_key(kernel): 1e6 * statistics.median(found) for kernel, found in zip(KERNELS, times, strict=True)},
            "ratio": {_key(k): _quartiles([a / b for a, b in zip(times[0], t, strict=True)]) for k, t in zip(KERNELS, times, strict=True)},
            "machine": describe_machine(),
        }
        with log.open("a") as lines:
            lines.write(json.dumps(cell) + "\n")
        print(f"{done + 1} of {len(missing)}, {time.perf_counter() - start:.0f} s:", shape, {k: round(v, 1) for k, v in cell["us"].items()})


def _log(kind: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"product_costs_{kind}.jsonl"


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _key(kernel: Kernel) -> str:
    return f"{kernel.name}/{kernel.block}" if kernel.block else kernel.name


def _quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, (25, 50, 75))]


def fit(name: str, *, write: bool) -> None:
    """Fit the profile of this kind of processor, and say how well it holds."""
    kind = processor_kind()
    cells = _read(_log(kind))
    costs: dict[Any, Cost] = {}
    errors: list[float] = []
    for kernel_name in dict.fromkeys(kernel.name for kernel in KERNELS):
        alike = [kernel for kernel in KERNELS if kernel.name == kernel_name]
        pairs = [(np.array(often_paid(kernel, *cell["shape"])), cell["us"][_key(kernel)]) for cell in cells for kernel in alike]
        relative = np.array([parts / time for parts, time in pairs])
        found = _non_negative(relative)
        costs[kernel_name] = Cost(*(float(f"{number:.3g}") for number in found))
        errors += [abs(float(row @ found) - 1) for row in relative]
    margin = next((m for m in MARGINS if min(_choices(cells, [_profile(name, kind, m, costs)]), default=1.0) >= SLOWEST), MARGINS[-1])
    source = (
        f"medians of {len(cells)} shapes (K and N {SHAPES[0][0]} to 4096, {ROWS[0]} to {ROWS[-1]} rows) by benchmarks/product_costs.py, "
        f"one thread, {cells[0]['machine'].split(',')[0]}, {kind_title(kind)}; half of the predictions within {np.median(errors):.0%}"
    )
    profile = _profile(name, kind, margin, costs, source)
    text = _as_source(name, profile)
    body = "\n\n".join([_explanation(kind, cells, profile, errors), f"```python\n{text}```", _table(cells)])
    print(
        write_result(f"product_costs_{kind}", f"Costs of products, {kind_title(kind)}", body, ["onnx", "onnxruntime", "numpy"]).read_text()
    )
    if write:
        path = Path(profiles.__file__)
        replaced, count = re.subn(rf"^{name} = Profile\(.*?^\)\n", lambda _: text, path.read_text(), flags=re.DOTALL | re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{path} has no profile {name}")
        path.write_text(replaced)


def _non_negative(parts: np.ndarray) -> np.ndarray:
    """The costs, none below 0, with the least sum of squares of ``parts @ costs - 1``: coordinate descent."""
    scale = np.linalg.norm(parts, axis=0)
    used = np.flatnonzero(scale)
    columns = parts[:, used] / scale[used]
    gram, goal = columns.T @ columns, columns.T @ np.ones(len(columns))
    costs = np.zeros(len(used))
    for _ in range(20000):
        for place in range(len(used)):
            costs[place] = max(0.0, costs[place] + goal[place] - gram[place] @ costs)
    all_costs = np.zeros(parts.shape[1])
    all_costs[used] = costs / scale[used]
    return all_costs


def _profile(name: str, kind: str, margin: float, costs: Any, source: str = "") -> Profile:
    title = kind if name.count("_") == 1 else f"{kind} ({name.rsplit('_', 1)[1]})"
    return Profile(name=title, source=source, margin=margin, costs=costs)


def _choices(cells: list[dict[str, Any]], machines: Sequence[Profile]) -> list[float]:
    """The measured speed of what the decision takes for each layer: for weights of 2, 4 and 8 bits, activations in float and rounded."""
    speeds = []
    for cell in cells:
        for bits in (2, 4, 8):
            longest = max(kernel.block for kernel in FUSED if kernel.name == f"fused {bits}")
            kernels = [kernel for kernel in FUSED if kernel in ((f"fused {bits}", longest), ("fused 8", 256))]
            for extra in ([], [Kernel("dynamic uint8" if bits == 8 else "dynamic int8")]):
                kernel = choose([*kernels, *extra], Product(*cell["shape"]), machines).kernel
                if kernel != FLOAT:
                    speeds.append(cell["ratio"][_key(kernel)][1])
    return speeds


def _says(cells: list[dict[str, Any]], machines: Sequence[Profile], who: str) -> str:
    speeds = sorted(_choices(cells, machines))
    slow = sum(speed < SLOWEST for speed in speeds)
    taken = f"{who} takes an integer form for {len(speeds)} of {6 * len(cells)} (2, 4, 8 bits; activations in float or rounded)"
    if not speeds:
        return f"{taken}."
    middle = statistics.median(speeds)
    return f"{taken}: the slowest is {speeds[0]:.2f} times as fast as float, the median {middle:.2f}, and {slow} are below {SLOWEST}."


def _as_source(name: str, profile: Profile) -> str:
    half = profile.source.rindex(" ", 0, 110) + 1
    lines = [f'        "{kernel}": Cost({", ".join(f"{number:g}" for number in cost)}),' for kernel, cost in profile.costs.items()]
    return "\n".join(
        [
            f"{name} = Profile(",
            f'    name="{profile.name}",',
            f'    source="{profile.source[:half]}"',
            f'    "{profile.source[half:]}",',
            f"    margin={profile.margin:g},",
            "    costs={",
            *lines,
            "    },",
            ")",
            "",
        ]
    )


def _explanation(kind: str, cells: list[dict[str, Any]], profile: Profile, errors: list[float]) -> str:
    others = [machine for machine in profiles.KINDS["portable"] if not machine.name.startswith(kind)]
    return (
        f"{len(cells)} products, each in {len(KERNELS)} forms in turns, one thread. Predictions: half within {np.median(errors):.0%}, "
        f"nine of ten within {np.quantile(errors, 0.9):.0%}. {_says(cells, [profile], f'At its margin of {profile.margin:g} the profile')} "
        f"{_says(cells, [profile, *others], 'The portable target')}\n\nCosts: {', '.join(UNITS)}."
    )


def _table(cells: list[dict[str, Any]]) -> str:
    """Every measured product; below 1 a form is slower than float."""
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell["shape"][1] * cell["shape"][2], cell["shape"])):
        many, inputs, outputs = cell["shape"]
        ratios = (cell["ratio"][_key(kernel)] for kernel in KERNELS[1:])
        cells_of_row = (f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in ratios)
        rows.append((f"{inputs} x {outputs}", many, f"{cell['us'][_key(FLOAT)]:.3g}", *cells_of_row))
    header = ("K x N", "rows", "float us", *(f"{_key(kernel)}" for kernel in KERNELS[1:]))
    return "Float's time over that of each form (name/block), median [quartiles] of the turns.\n\n" + markdown_table(header, rows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "fit"))
    parser.add_argument("profile", nargs="?", help="name of the profile in layout/profiles.py")
    parser.add_argument("--seconds", type=float, default=340.0)
    parser.add_argument("--write", action="store_true", help="put the profile into layout/profiles.py")
    arguments = parser.parse_args()
    if arguments.step == "measure":
        measure(arguments.seconds)
    elif arguments.profile is None:
        parser.error("fit needs the name of a profile, as X86_AVX2")
    else:
        fit(arguments.profile, write=arguments.write)


if __name__ == "__main__":
    main()
