"""Our ONNX files against float and onnxruntime's own quantizers: latency in turns, file, memory, error.

    python -m benchmarks.onnx_latency build              # write the files of all models (minutes, on any machine), and their memory
    python -m benchmarks.onnx_latency race               # time them on this kind of processor, and write its table and plot
    python -m benchmarks.onnx_latency report             # table and plot of what was raced on this kind
    python -m benchmarks.onnx_latency profile encoder    # which operators the time goes to, by onnxruntime's profiler

The first two go on where they stopped; a name behind them takes one model. The kind of processor is found out and is part of the result's
name; the files are the same for all kinds, but for those of the kind's own target where it chooses other forms than the portable one.

The weights are random, which neither speed nor size see; the error is that of rounding random weights and activations, larger than a
trained model's. All files of one model come from the same float weights.
"""

import argparse
import itertools
import json
import logging
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._kind import kind_title, processor_kind
from benchmarks._models import Decoder, MobileNetV2, Separator, minilm_size, resnet18_for_224

FOLDER = Path(".onnx_latency")
SECONDS_PER_CELL = 6.0
ROUNDS = (5, 40)
SLOWEST = 0.97
OWN_TARGETS = ("x86-avx2", "x86-vnni")


@dataclass(frozen=True)
class Case:
    title: str
    make: Callable[[], nn.Module]
    example: Callable[[int], tuple[Tensor, ...]]
    batches: tuple[int, ...]
    has_convolutions: bool


def _ids(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(30522, (batch, 32)),)


def _images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 224, 224),)


def _step(batch: int) -> tuple[Tensor, ...]:
    cache = (6, batch, 12, 64, 64)
    return torch.randint(50257, (batch, 1)), torch.tensor([64]), torch.randn(cache), torch.randn(cache)


def _sound(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 1, 16384),)


CASES = {
    "encoder": Case("encoder of MiniLM's size, sequence 32", minilm_size, _ids, (1, 16), False),
    "decoder": Case("decoder of GPT-2's kind, one token, 64 cached", Decoder, _step, (1,), False),
    "resnet18": Case("ResNet-18, 224x224", resnet18_for_224, _images, (1, 8), True),
    "mobilenet_v2": Case("MobileNet-v2, 224x224", MobileNetV2, _images, (1, 8), True),
    "separator": Case("conv + LSTM separator, 16384 samples", Separator, _sound, (1, 4), True),
}


def build(name: str) -> None:
    """Write every file of a model that is not built yet, and measure what memory each takes."""
    case, folder = CASES[name], FOLDER / name
    if (folder / "facts.json").exists():
        return
    _write_files(name)
    facts = {stem: _facts(path, exact, case) for stem, (path, exact) in _files(name, None).items()}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def _write_files(name: str) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    case, folder = CASES[name], FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = case.make()
    _settle(model, case)
    float_file = folder / "float.onnx"
    batches = [case.example(2 if len(case.batches) > 1 else 1) for _ in range(4)]
    _export_float(model, case, float_file)
    names = _input_names(float_file)
    _build_ours(model, case, folder, batches)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([dict(zip(names, (t.numpy() for t in batch), strict=True)) for batch in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.items, None)

    prepared = folder / "preprocessed.onnx"
    quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
    without_shapes = onnx.load(prepared)  # its optimizer leaves shapes of values that it has turned
    del without_shapes.graph.value_info[:]
    onnx.save(without_shapes, prepared)
    quantize_dynamic(prepared, folder / "ort_dynamic.onnx", weight_type=QuantType.QInt8, per_channel=True)
    quantize_static(
        prepared,
        folder / "ort_static.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    prepared.unlink()
    if not case.has_convolutions:
        for bits in (4, 8):
            quantizer = MatMulNBitsQuantizer(onnx.load(float_file), bits=bits, block_size=32, is_symmetric=False, accuracy_level=4)
            quantizer.process()
            quantizer.model.save_model_to_file(str(folder / f"ort_nbits{bits}.onnx"), False)


def _settle(model: nn.Module, case: Case) -> None:
    """Give BatchNorms the statistics of the inputs, so that values neither vanish nor explode."""
    with torch.no_grad():
        for _ in range(20 if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) else 0):
            model.train()(*case.example(4))
    model.eval()


def _build_ours(model: nn.Module, case: Case, folder: Path, batches: list[tuple[Tensor, ...]]) -> None:
    from diffq_fx import DiffQConfig, convert_diffq, prepare_diffq
    from diffq_fx.export import export_onnx

    notes: dict[str, Any] = {}
    portable: list[tuple[str, str]] = []
    kinds = ("float", "int8") if case.has_convolutions else ("float", "dynamic")
    for bits in (4, 8):
        config = DiffQConfig(target_bits=None, init_bits=bits)
        example = case.example(1)
        converted = convert_diffq(prepare_diffq(model, example, config))
        targets = ("portable",) if case.has_convolutions else ("portable", *OWN_TARGETS)
        for activations, target in itertools.product(kinds, targets):
            stem = f"ours{bits}_{activations}"
            result = export_onnx(
                converted,
                example,
                folder / f"{stem}.onnx" if target == "portable" else folder / f"{stem}@{target}.onnx",
                activations=activations,
                target=target,
                calibration=batches if activations == "int8" else None,
            )
            forms = [(record.rule, (record.choice or "").partition(":")[0]) for record in result.weights]
            if target != "portable" and forms == portable:
                result.path.unlink()
                continue
            portable = forms if target == "portable" else portable
            rules: dict[str, int] = {}
            for record in result.weights:
                rules[record.rule] = rules.get(record.rule, 0) + 1
            notes[result.path.stem] = {
                "rules": rules,
                "exact_error": result.max_relative_error,
                "payload_bytes": result.payload_bytes,
                "container_bytes": result.container_payload_bytes,
            }
            print(result.path, rules, f"{result.max_relative_error:.1e} {result.fast_relative_error:.1e}", flush=True)
    (folder / "notes.json").write_text(json.dumps(notes, indent=1))


def _export_float(model: nn.Module, case: Case, path: Path) -> None:
    from diffq_fx.export.onnx.translation import quiet

    is_dynamic = len(case.batches) > 1
    example = case.example(2 if is_dynamic else 1)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in example) if is_dynamic else None
    with quiet():
        torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)


def _input_names(path: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def _options(path: Path, threads: int, *, exact: bool) -> Any:
    import onnxruntime

    from diffq_fx.export import session_options

    if path.name.startswith("ours"):
        options = session_options(path, exact=exact, threads=threads)
    else:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads of one model would slow down the next
    return options


def _files(name: str, kind: str | None) -> dict[str, tuple[Path, bool]]:
    """Stem -> file, and whether it runs exactly: the files of a model that one kind of processor races; all of them for None."""
    files = {path.stem: (path, False) for path in sorted((FOLDER / name).glob("*.onnx")) if path.stem != "preprocessed"}
    files = {stem: entry for stem, entry in files.items() if kind is None or stem.partition("@")[2] in ("", kind)}
    for stem, (path, _) in list(files.items()):
        if stem.startswith("ours") and stem.endswith("_float") and not CASES[name].has_convolutions:
            files[f"{stem}_exact"] = (path, True)
    return files


def race(name: str, kind: str, threads_list: tuple[int, ...]) -> None:
    """Time all files of a model in turns, at each batch and number of threads that is not timed yet."""
    import onnxruntime

    case, files, log = CASES[name], _files(name, kind), FOLDER / name / f"race_{kind}.json"
    cells = json.loads(log.read_text()) if log.exists() else []
    known = {(cell["batch"], cell["threads"]) for cell in cells}
    for threads in threads_list:
        missing = [batch for batch in case.batches if (batch, threads) not in known]
        if not missing:
            continue
        sessions = {
            stem: onnxruntime.InferenceSession(str(path), _options(path, threads, exact=exact), providers=["CPUExecutionProvider"])
            for stem, (path, exact) in files.items()
        }
        for batch in missing:
            cells.append(_race_cell(case, sessions, batch, threads))
            log.write_text(json.dumps(cells, indent=1))
            print(name, batch, threads, json.dumps({stem: round(ms, 3) for stem, ms in cells[-1]["median"].items()}), flush=True)


def _race_cell(case: Case, sessions: dict[str, Any], batch: int, threads: int) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = [tensor.numpy() for tensor in case.example(batch)]
    feeds = {stem: dict(zip([e.name for e in s.get_inputs()], inputs, strict=True)) for stem, s in sessions.items()}
    outputs = {stem: session.run(None, feeds[stem])[0] for stem, session in sessions.items()}
    start = time.perf_counter()
    for stem, session in sessions.items():
        session.run(None, feeds[stem])
    once = time.perf_counter() - start
    rounds = int(min(max(SECONDS_PER_CELL / once, ROUNDS[0]), ROUNDS[1]))
    repeats = max(1, int(0.02 * len(sessions) / once))
    times: dict[str, list[float]] = {stem: [] for stem in sessions}
    shuffled = random.Random(0)  # a fixed order gives some files the same neighbour in every turn
    for _ in range(rounds):
        for stem in shuffled.sample(list(sessions), len(sessions)):
            session, feed = sessions[stem], feeds[stem]
            session.run(None, feed)  # its memory is warm again, as in a process of its own
            begin = time.perf_counter()
            for _ in range(repeats):
                session.run(None, feed)
            times[stem].append(1e3 * (time.perf_counter() - begin) / repeats)
    reference = outputs["float"]
    return {
        "batch": batch,
        "threads": threads,
        "rounds": rounds,
        "median": {stem: statistics.median(values) for stem, values in times.items()},
        "ratio": {stem: _quartiles([a / b for a, b in zip(times["float"], values, strict=True)]) for stem, values in times.items()},
        "error": {stem: float(np.abs(output - reference).max() / np.abs(reference).max()) for stem, output in outputs.items()},
        "rms": {stem: float(np.sqrt(((output - reference) ** 2).mean() / (reference**2).mean())) for stem, output in outputs.items()},
    }


def _quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, (25, 50, 75))]


_PEAK = """
import sys, json, onnxruntime
from pathlib import Path
from benchmarks.onnx_latency import CASES, _options
name, path, exact = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True"
inputs = [tensor.numpy() for tensor in CASES[name].example(1)]
options = _options(path, 1, exact=exact)
def mib(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024
before = mib("VmRSS")
session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
session.run(None, dict(zip([e.name for e in session.get_inputs()], inputs)))
print(json.dumps({"peak_mib": mib("VmHWM"), "before_mib": before, "resident_mib": mib("VmRSS")}))
"""


def _facts(path: Path, exact: bool, case: Case) -> dict[str, Any]:
    """File size, and the memory of a fresh process that loads the file and runs it once at batch 1."""
    name = path.parent.name
    command = [sys.executable, "-c", _PEAK, name, str(path), str(exact)]
    memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"file_mib": path.stat().st_size / 2**20, "title": case.title, **memory}


def profile(name: str, threads: int) -> None:
    """Write a table of the operators that the time of a run goes to, at batch 1, for float and our files."""
    from benchmarks._result import markdown_table, write_result

    case, folder = CASES[name], FOLDER / name
    torch.manual_seed(1)
    inputs = [tensor.numpy() for tensor in case.example(1)]
    stems = [stem for stem in TITLES if stem == "float" or stem.startswith("ours")]
    files = {stem: folder / f"{stem}.onnx" for stem in stems if (folder / f"{stem}.onnx").exists()}
    found = _operator_times(files, inputs, threads)
    operators = sorted({op for times in found.values() for op in times}, key=lambda op: -max(t.get(op, (0, 0))[1] for t in found.values()))
    rows = []
    for op in operators:
        cells = [found[stem].get(op) for stem in files]
        rows.append((op, *("" if cell is None else f"{cell[1]:.3f} ({cell[0]})" for cell in cells)))
    rows.append(("all", *(f"{sum(ms for _, ms in found[stem].values()):.3f}" for stem in files)))
    body = (
        f"{case.title}, batch 1, {threads} thread{'s' * (threads > 1)}: ms of one run in each operator, and how many of it run: the median "
        f"over {PROFILED_RUNS} runs under onnxruntime's profiler, files in turns.\n\n"
        + markdown_table(("operator", *(TITLES[stem] for stem in files)), rows)
        + "\n\nWhat bounds each file: "
        + "; ".join(f"{TITLES[stem]}: {_largest_share(times)}" for stem, times in found.items())
        + "."
    )
    path = write_result(f"onnx_profile_{name}", f"Where the time goes: {case.title}", body, ["torch", "onnx", "onnxruntime"])
    print(path.read_text())


PROFILED_RUNS = 60


def _largest_share(times: dict[str, tuple[int, float]]) -> str:
    total = sum(ms for _, ms in times.values())
    op = max(times, key=lambda op: times[op][1])
    return f"{op}, {100 * times[op][1] / total:.0f} % of the time in {times[op][0]} nodes"


def _operator_times(files: dict[str, Path], inputs: list[np.ndarray], threads: int) -> dict[str, dict[str, tuple[int, float]]]:
    """For each file: operator -> how many of it one run has, and their milliseconds."""
    import onnxruntime

    sessions = {}
    for stem, path in files.items():
        options = _options(path, threads, exact=False)
        options.enable_profiling = True
        options.profile_file_prefix = str(path.with_suffix(""))
        sessions[stem] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shuffled = random.Random(0)
    for _ in range(PROFILED_RUNS + 1):
        for stem in shuffled.sample(list(sessions), len(sessions)):
            sessions[stem].run(None, dict(zip([entry.name for entry in sessions[stem].get_inputs()], inputs, strict=True)))
    return {stem: _read_profile(Path(session.end_profiling())) for stem, session in sessions.items()}


def _read_profile(log: Path) -> dict[str, tuple[int, float]]:
    events = json.loads(log.read_text())
    log.unlink()
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")[1:]
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    per_run: dict[str, list[list[float]]] = {}
    for index, (start, stop) in enumerate(runs):
        for event in kernels:
            if start <= event["ts"] < stop:
                per_run.setdefault(event["args"]["op_name"], [[] for _ in runs])[index].append(event["dur"] / 1000)
    return {op: (round(statistics.median(map(len, times))), statistics.median(map(sum, times))) for op, times in per_run.items()}


TITLES = {
    "float": "float",
    "ours4_float": "ours 4 bits",
    "ours4_float_exact": "ours 4 bits, exact",
    "ours4_dynamic": "ours 4 bits, dynamic int8 activations",
    "ours4_int8": "ours 4 bits, int8 activations",
    "ours8_float": "ours 8 bits",
    "ours8_float_exact": "ours 8 bits, exact",
    "ours8_dynamic": "ours 8 bits, dynamic int8 activations",
    "ours8_int8": "ours 8 bits, int8 activations",
    "ort_dynamic": "onnxruntime quantize_dynamic",
    "ort_static": "onnxruntime quantize_static (QDQ)",
    "ort_nbits4": "onnxruntime MatMulNBits 4 bits",
    "ort_nbits8": "onnxruntime MatMulNBits 8 bits",
}


def _title(stem: str) -> str:
    """``ours4_float@x86-avx2_exact`` for people."""
    base, _, target = stem.removesuffix("_exact").partition("@")
    title = TITLES[base + "_exact" * stem.endswith("_exact")]
    return f"{title}, target {target}" if target else title


def report(kind: str) -> None:
    """Write the table, the plot and the numbers of everything that was raced on a kind of processor."""
    from benchmarks._result import RESULTS, markdown_table, write_result

    raced: dict[str, Any] = {}
    for name in CASES:
        log = FOLDER / name / f"race_{kind}.json"
        if log.exists():
            raced[name] = {"cells": json.loads(log.read_text()), "files": json.loads((FOLDER / name / "facts.json").read_text())}
    parts = []
    for name, results in raced.items():
        cells, files = results["cells"], results["files"]
        heads = [f"batch {cell['batch']}, {cell['threads']} thr." for cell in cells]
        rows = []
        for stem in sorted(cells[0]["median"], key=lambda stem: list(TITLES).index(stem.partition("@")[0])):
            error = f"{100 * cells[0]['error'][stem]:.2g} / {100 * cells[0]['rms'][stem]:.2g}"
            facts = files[stem]
            memory = f"{facts['peak_mib'] - facts['before_mib']:.0f} / {facts['resident_mib'] - facts['before_mib']:.0f}"
            rows.append((_title(stem), *(_cell(cell, stem) for cell in cells), f"{facts['file_mib']:.2f}", memory, error))
        header = ("file", *heads, "file MiB", "memory MiB peak / after", "error % max / rms")
        parts.append(f"## {CASES[name].title}\n\n{markdown_table(header, rows)}\n\n{_slower(cells)}")
    if missing := [case.title for name, case in CASES.items() if name not in raced]:
        parts.append(f"Not raced yet: {'; '.join(missing)}.")
    intro = (
        "Times: median ms of one run, and how many times faster than float it is, median [quartiles] of the pairs. All files of a model "
        "run in turns in one process. Memory: of a fresh process that loads the file and runs it once at batch 1, above what it had "
        "before: the peak, and what stays. Error: against the float file on one random input, largest difference / largest value, "
        "and root mean square. Files of ours are for the portable target where no other one is named; those of another target are left out "
        'where they are the same. "exact" runs them with session_options(exact=True), which is for checks and not for speed.'
    )
    title = f"ONNX files in onnxruntime's CPU provider, {kind_title(kind)}"
    path = write_result(f"onnx_latency_{kind}", title, "\n\n".join([intro, *parts]), ["torch", "onnx", "onnxruntime"])
    (RESULTS / f"{path.stem}.json").write_text(json.dumps(raced, indent=1))
    _plot(raced, path.with_suffix(".png"))
    print(path.read_text())


def _slower(cells: list[dict[str, Any]]) -> str:
    """Every file of ours that runs as it was made and is more than 3 % slower than float."""
    found = [
        f"{_title(stem)} {middle:.2f} at batch {cell['batch']}, {cell['threads']} thr."
        for cell in cells
        for stem, (_, middle, _) in cell["ratio"].items()
        if stem.startswith("ours") and not stem.endswith("_exact") and middle < SLOWEST
    ]
    return f"Of ours, slower than float by more than 3 %: {'; '.join(found) or 'none'}."


def _cell(cell: dict[str, Any], stem: str) -> str:
    low, middle, high = cell["ratio"][stem]
    time_ms = f"{cell['median'][stem]:.3g}"
    return time_ms if stem == "float" else f"{time_ms} ({middle:.2f} [{low:.2f}, {high:.2f}])"


def _plot(raced: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(raced), figsize=(4.2 * len(raced), 4.2), squeeze=False)
    for axis, (name, results) in zip(axes[0], raced.items(), strict=True):
        cell = results["cells"][0]
        for stem, (low, middle, high) in cell["ratio"].items():
            color = "black" if stem == "float" else "tab:blue" if stem.startswith("ours") else "tab:orange"
            size = results["files"][stem]["file_mib"]
            axis.errorbar(size, middle, yerr=[[middle - low], [high - middle]], fmt="o", color=color, markersize=5)
            axis.annotate(stem, (size, middle), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.axhline(1, color="gray", linewidth=0.5)
        axis.set(title=f"{name}, batch {cell['batch']}, {cell['threads']} thread", xlabel="file, MiB", xscale="log")
    axes[0][0].set_ylabel("times faster than float")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line."""
    warnings.simplefilter("ignore")  # bits that were not trained
    logging.disable(logging.INFO)  # onnxruntime's quantizers tell of every node
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("build", "race", "report", "profile"))
    parser.add_argument("model", nargs="?", choices=tuple(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    kind = processor_kind()
    for name in [arguments.model] if arguments.model else CASES:
        if arguments.step == "build":
            build(name)
        elif arguments.step == "profile":
            profile(name, max(arguments.threads))
        elif arguments.step == "race":
            race(name, kind, tuple(arguments.threads))
    if arguments.step in ("race", "report"):
        report(kind)


if __name__ == "__main__":
    main()
