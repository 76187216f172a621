"""Every model of the zoo (tests/zoo) that exports: our file with its session options against the float export of the same model.

    python -m benchmarks.zoo_latency build               # write the files, some seconds a model; goes on where it stopped
    python -m benchmarks.zoo_latency race --seconds 100  # time what is not timed yet, until the time is over
    python -m benchmarks.zoo_latency report              # the table

The models are tiny, so that most of a run is onnxruntime's own work: this is where a layout that adds nodes is seen. Times come in blocks
of some milliseconds, in an order that is drawn for each turn, and every session is made anew several times, for two sessions of one and
the same file can differ by some percent. How much they do is measured beside: the float file against itself.
"""

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

FOLDER = Path(".zoo_latency")
LOADS, ROUNDS, BLOCK_SECONDS = 6, 40, 0.0015
BAR = 1.03
BITS = (4,)


def build(names: list[str], *, again: bool) -> None:
    """Write the files of every model; a model without files keeps the reason."""
    from zoo.models import BY_NAME, ZOO

    for entry in [BY_NAME[name] for name in names] or ZOO:
        folder = FOLDER / entry.name
        if (folder / "built.json").exists() and not again:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "race.json").unlink(missing_ok=True)
        built = {"reason": f"no ONNX form: {entry.no_onnx}"} if entry.no_onnx else _build(entry, folder)
        (folder / "built.json").write_text(json.dumps(built))
        print(entry.name, built, flush=True)


def _build(entry: Any, folder: Path) -> dict[str, Any]:
    import onnx_ir as ir

    from diffq_fx import DiffQConfig, ExportError, convert_diffq, prepare_diffq
    from diffq_fx.export import export_onnx
    from diffq_fx.export.onnx.examples import ExportExample
    from diffq_fx.export.onnx.tracing import Tracer

    args, kwargs = entry.example()
    example = kwargs or args
    model = entry.make().eval()
    try:
        traced = Tracer(model, ExportExample.of(example)).trace()
    except ExportError:
        return {"reason": "torch cannot export the float model"}
    ir.save(traced.model, folder / "float.onnx")
    tensors = ExportExample.of(example).tensors
    inputs = {str(value.name): tensor.numpy() for value, tensor in zip(traced.model.graph.inputs, tensors, strict=True)}
    np.savez(folder / "inputs.npz", **inputs)
    rules: dict[str, dict[str, int]] = {}
    for bits in BITS:
        config = DiffQConfig(target_bits=None, init_bits=bits, min_size=0)
        converted = convert_diffq(prepare_diffq(entry.make(), example, config, scope=entry.asked))
        result = export_onnx(converted, example, folder / f"ours{bits}.onnx")
        found = [record.rule for record in result.weights]
        rules[f"ours{bits}"] = {rule: found.count(rule) for rule in dict.fromkeys(found)}
    return {"rules": rules, "weights": sum(p.numel() for p in model.parameters())}


def race(names: list[str], seconds: float) -> None:
    """Time the models that are built and not timed yet."""
    folders = [folder for folder in sorted(FOLDER.iterdir()) if (folder / "float.onnx").exists()]
    if names:
        folders = [folder for folder in folders if folder.name in names]
    else:
        folders = [folder for folder in folders if not (folder / "race.json").exists()]
    random.shuffle(folders)
    begin = time.perf_counter()
    for count, folder in enumerate(folders):
        if time.perf_counter() - begin > seconds:
            print(f"{len(folders) - count} models left")
            return
        found = _race(folder)
        (folder / "race.json").write_text(json.dumps(found))
        print(folder.name, {stem: round(values["ratio"][1], 3) for stem, values in found.items()}, flush=True)


def _sessions(folder: Path) -> dict[str, Any]:
    import onnxruntime

    from diffq_fx.export import session_options

    stems = {"float": "float", "float again": "float", **{f"ours{bits}": f"ours{bits}" for bits in BITS}}
    sessions = {}
    for stem in random.sample(list(stems), len(stems)):
        path = folder / f"{stems[stem]}.onnx"
        options = session_options(path, threads=1) if stem.startswith("ours") else onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        sessions[stem] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return sessions


def _race(folder: Path) -> dict[str, Any]:
    inputs = dict(np.load(folder / "inputs.npz"))
    times: dict[str, list[float]] = {}
    for _ in range(LOADS):
        sessions = _sessions(folder)
        repeats = _repeats(sessions["float"], inputs)
        for session in sessions.values():
            session.run(None, inputs)
        for _ in range(ROUNDS):
            for stem in random.sample(list(sessions), len(sessions)):
                session = sessions[stem]
                session.run(None, inputs)
                begin = time.perf_counter()
                for _ in range(repeats):
                    session.run(None, inputs)
                times.setdefault(stem, []).append(1e6 * (time.perf_counter() - begin) / repeats)
    return {
        stem: {
            "median_us": statistics.median(values),
            "ratio": [float(q) for q in np.percentile(np.array(values) / np.array(times["float"]), (25, 50, 75))],
        }
        for stem, values in times.items()
    }


def _repeats(session: Any, inputs: dict[str, np.ndarray]) -> int:
    session.run(None, inputs)
    begin = time.perf_counter()
    for _ in range(3):
        session.run(None, inputs)
    return max(1, int(3 * BLOCK_SECONDS / (time.perf_counter() - begin)))


def report() -> None:
    """Write the table of everything that was timed."""
    from benchmarks._result import markdown_table, write_result

    rows, left, slower, count = [], [], [], 0
    for folder in sorted(FOLDER.iterdir()):
        built = json.loads((folder / "built.json").read_text())
        if "reason" in built or not (folder / "race.json").exists():
            left.append(f"{folder.name} ({built.get('reason', 'not timed yet')})")
            continue
        found = json.loads((folder / "race.json").read_text())
        cells = []
        for stem in ("float again", *(f"ours{bits}" for bits in BITS)):
            low, middle, high = found[stem]["ratio"]
            cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
            if stem.startswith("ours"):
                count += 1
                if middle > BAR:
                    slower.append(f"{folder.name}, {stem[4:]} bits")
        rules = "; ".join(
            f"{stem[4:]} bits: " + ", ".join(f"{n} {rule}" for rule, n in per.items()) for stem, per in built["rules"].items()
        )
        rows.append((folder.name, built["weights"], f"{found['float']['median_us']:.1f}", *cells, rules))
    header = ("model", "parameters", "float us", "float again / float", *(f"ours {bits} bits / float" for bits in BITS), "rules")
    body = (
        f"Time over float, median [quartiles] of the pairs: below 1 is faster than float. {LOADS} loads of every file, {ROUNDS} turns "
        f"each, one thread, the batch of the zoo's example. Bar: {BAR}.\n\n"
        f"{count - len(slower)} of {count} files are within the bar; above it: {'; '.join(slower) or 'none'}."
    )
    body += f"\n\n{markdown_table(header, rows)}"
    if left:
        body += f"\n\nNot in the table: {'; '.join(left)}."
    print(
        write_result("zoo_latency", "The zoo in onnxruntime: our files against float", body, ["torch", "onnx", "onnxruntime"]).read_text()
    )


def main() -> None:
    """Read the command line."""
    warnings.simplefilter("ignore")  # bits that were not trained
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("build", "race", "report"))
    parser.add_argument("models", nargs="*")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--again", action="store_true", help="build files that are there")
    arguments = parser.parse_args()
    if arguments.step == "build":
        build(arguments.models, again=arguments.again)
    elif arguments.step == "race":
        race(arguments.models, arguments.seconds)
    else:
        report()


if __name__ == "__main__":
    main()
