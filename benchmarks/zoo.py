"""Architectures of other people's libraries, each through everything: prepare, train, eval, convert, packed file, ONNX at another batch.

    python -m benchmarks.zoo run --minutes 60            # goes on where it stopped; --families and names choose
    python -m benchmarks.zoo run --again failed          # what ended so is run again
    python -m benchmarks.zoo report                      # the table

Each model runs in a process of its own, forked from one that has imported the libraries, with a limit of processor time and of memory.
Times are processor time. They are compared within the process alone: prepare with forwards of the float model before and after it, our
export with torch.onnx's own before or after it, so that other load on the machine is in both.

Besides requirements.txt it wants, all with ``pip install --no-deps``: torchvision, torchaudio (without its folder lib, compiled for CUDA),
timm, diffusers, pytorchcv, torch-geometric, xxhash, einops, vit-pytorch, x-transformers, loguru, segmentation-models-pytorch,
denoising-diffusion-pytorch, ema-pytorch, encodec, conformer, asteroid, asteroid-filterbanks, julius, torch-optimizer, pytorch-ranger,
soundfile, speechbrain, hyperpyyaml, ruamel.yaml, sentencepiece, monai and peft.
"""

import argparse
import gc
import json
import os
import resource
import signal
import statistics
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks._result import RESULTS, markdown_table, write_result
from benchmarks.zoo_models import architectures, import_libraries
from benchmarks.zoo_models.entry import Architecture
from benchmarks.zoo_models.steps import Measured, measure, resident

LINES = RESULTS / "zoo.jsonl"
SECONDS, GIB = 240, 6
BEFORE_PREPARE = ("build", "float step")
OUTCOMES = ("whole", "all but ONNX", "without ONNX", "refused", "failed", "float fails")
MOST_FORWARDS, MOST_TORCH, SLOW = 20, 5, 0.005


def known() -> dict[str, dict[str, Any]]:
    """The last line of each model."""
    lines = LINES.read_text().splitlines() if LINES.exists() else []
    return {line["model"]: line for line in map(json.loads, lines)}


def key_of(entry: Architecture) -> str:
    return f"{entry.library}: {entry.name}"


def run(names: list[str], families: list[str], again: list[str], minutes: float, *, onnx: bool, torch_onnx: bool) -> None:
    """Run what has no line yet, a family at a time, until the time is over."""
    import_libraries()
    _export_once()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all pages of the libraries
    end, unfinished = time.monotonic() + 60 * minutes, {None, *again, *(["without ONNX"] if onnx else [])}
    for entry in architectures():
        key = key_of(entry)
        if (names and not any(name in key for name in names)) or (families and entry.family not in families):
            continue
        if time.monotonic() > end:
            print("the time is over")
            return
        if not names and known().get(key, {}).get("outcome") not in unfinished:  # another process may have run it
            continue
        line = in_own_process(entry, onnx=onnx, torch_onnx=torch_onnx)
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{key}: {line['outcome']} {line.get('step', '')} {line.get('message', '')[:300]}", flush=True)


def _export_once() -> None:
    """What the first export imports and fills is there before any is timed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(4, 4), (torch.zeros(2, 4),), dynamo=True, verbose=False)
    import onnxruntime  # noqa: F401


def in_own_process(entry: Architecture, *, onnx: bool, torch_onnx: bool) -> dict[str, Any]:
    """Fork, measure there, and read the line that comes back; a process that ends without one was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        line = _measured(entry, onnx=onnx, torch_onnx=torch_onnx)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(line))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    line = json.loads(text) if text else {"outcome": "failed", "message": f"the process ended with status {status}"}
    return {"model": key_of(entry), "library": entry.library, "name": entry.name, "family": entry.family, **line}


def _measured(entry: Architecture, *, onnx: bool, torch_onnx: bool) -> dict[str, Any]:
    def out_of_time(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s of processor time")

    signal.signal(signal.SIGXCPU, out_of_time)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 30))
    most = resident("VmSize") + GIB * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    measured = Measured()
    try:
        measure(entry, measured, torch_first=zlib.crc32(entry.name.encode()) % 2 == 0, onnx=onnx, torch_onnx=torch_onnx)
    except Exception as error:  # noqa: BLE001  other people's code and ours: whatever ends a model is its result
        return {**measured.found, **_outcome(error, measured.at)}
    return {**measured.found, "outcome": "whole" if onnx else "without ONNX"}


def _outcome(error: Exception, step: str) -> dict[str, Any]:
    from diffq_fx.errors import DiffQError

    if step in BEFORE_PREPARE:
        outcome = "float fails"
    elif step == "prepare" and isinstance(error, DiffQError | ValueError):
        outcome = "refused"
    elif step.startswith("onnx") and isinstance(error, DiffQError):
        outcome = "all but ONNX"
    else:
        outcome = "failed"
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)][-3:]
    return {"outcome": outcome, "step": step, "message": f"{type(error).__name__}: {error}"[:2000], "where": where}


def _ratios(line: dict[str, Any]) -> tuple[float | None, float | None]:
    """Prepare in forwards, and our export beside torch.onnx's own."""
    seconds = line["seconds"]
    prepare = seconds["prepare"] / line["forward_seconds"] if "prepare" in seconds and "forward_seconds" in line else None
    return prepare, seconds["onnx"] / seconds["torch.onnx"] if {"onnx", "torch.onnx"} <= seconds.keys() else None


def _spread(values: list[float], most: float) -> str:
    return (
        f"median {statistics.median(values):.1f}, from {min(values):.1f} to {max(values):.1f}; "
        f"{sum(value <= most for value in values)} of {len(values)} are within {most}"
    )


def _text(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _of_torch(line: dict[str, Any]) -> str:
    """What torch.onnx does with the float model, if it was asked."""
    if "torch_onnx_failure" in line:
        return f"refuses the float model too: {line['torch_onnx_failure']}"
    return "fixes the batch of the float model too" if line.get("torch_onnx_fixes_batch") else ""


def _of_all_steps(ran: list[dict[str, Any]]) -> str:
    """Counts of those that were taken through every step; what torch refuses in float too is counted apart."""
    tried = [line for line in ran if line["outcome"] != "without ONNX"]
    whole = sum(line["outcome"] == "whole" for line in tried)
    of_torch = sum(line["outcome"] == "all but ONNX" and bool(_of_torch(line)) for line in tried)
    told = sum(line["outcome"] == "refused" or bool(line.get("known_before_training")) for line in tried)
    return (
        f"Of {len(tried)} that were taken through every step {whole} are whole. {of_torch} more are whole but for ONNX, where torch.onnx "
        f"refuses the float model too or fixes its batch; without these {whole / (len(tried) - of_torch):.1%} are whole. "
        f"Of the {len(tried) - whole} that are not whole {told} were refused with the same words before a training."
    )


def _prepare_beside_torch(ran: list[dict[str, Any]]) -> str:
    """What a fixed cost of prepare does on nets whose forward takes milliseconds, and what torch's own traces take."""
    timed = [line for line in ran if _ratios(line)[0] is not None]
    slow = [_ratios(line)[0] for line in timed if line["forward_seconds"] > SLOW]
    parts = [f"Of the {len(slow)} whose forward takes more than {SLOW * 1000:.0f} ms {sum(r <= MOST_FORWARDS for r in slow)} are within."]
    for name in ("torch.fx", "torch.export"):
        own = [line for line in timed if name in line["seconds"] and not (name == "torch.export" and "torch_onnx_failure" in line)]
        if own:
            theirs = statistics.median(line["seconds"][name] / line["forward_seconds"] for line in own)
            ours = statistics.median(line["seconds"]["prepare"] / line["forward_seconds"] for line in own)
            parts.append(f"{name} alone traces {len(own)} of them, in {theirs:.1f} forwards (median); prepare takes {ours:.1f} there.")
    return " ".join(parts)


def report() -> None:
    """Write the table of everything that was run."""
    chosen = {key_of(entry) for entry in architectures()}
    lines = [line for name, line in known().items() if name in chosen]
    ran = sorted((line for line in lines if line["outcome"] != "float fails"), key=lambda line: (line["family"], line["model"]))
    rows, prepares, exports, messages = [], [], [], []
    for line in ran:
        prepare, export = _ratios(line)
        prepares += [] if prepare is None else [prepare]
        exports += [] if export is None else [export]
        peak = max(line["peak_mib"].values(), default=0.0)
        rows.append(
            (
                line["name"],
                line["library"],
                line["family"],
                line.get("weights", ""),
                line.get("scope", ""),
                line["outcome"],
                _text(prepare),
                _text(export),
                f"{peak:.0f}",
            )
        )
        if "message" in line:
            texts = (" ".join(text.split()).replace("|", "\\|") for text in (line["message"], _of_torch(line)))
            known = {True: "yes", False: "no", None: "yes, prepare says it" if line["outcome"] == "refused" else ""}
            messages.append((line["model"], line["outcome"], line["step"], known[line.get("known_before_training")], *texts))
    counts, families = Counter(line["outcome"] for line in ran), Counter(line["family"] for line in ran)
    header = ("model", "library", "family", "weights", "scope", "outcome", "prepare, forwards", "export / torch.onnx", "peak MiB")
    body = [
        f"{len(ran)} architectures of {len({line['library'] for line in ran})} libraries: "
        + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
        + ".",
        "Families: " + ", ".join(f"{name} {count}" for name, count in families.items()) + ".",
        _of_all_steps(ran),
        f"Prepare in forwards (train mode, batch of 2, median of the forwards before and after it): {_spread(prepares, MOST_FORWARDS)}. "
        + _prepare_beside_torch(ran),
        f"export_onnx (with its check in onnxruntime) over torch.onnx's export of the float model: {_spread(exports, MOST_TORCH)}.",
        *(
            ["Without ONNX: all steps before the export were run, and were right; the export itself was not run yet."]
            if counts["without ONNX"]
            else []
        ),
        "Processor time on a machine with other load; peak MiB is the largest of all steps, above the memory before the step.",
        markdown_table(header, rows),
        "## What is not whole",
        "Known before a training: check_onnx, called with the float model, says the same. Torch: what torch.onnx says of the float model.",
        markdown_table(("model", "outcome", "step", "known before a training", "message", "torch"), messages),
    ]
    left = [f"{line['model']} ({line['message'].splitlines()[0][:120]})" for line in lines if line["outcome"] == "float fails"]
    if left:
        body.append("Not in the table, since the float model itself does not build, run or train here: " + "; ".join(left) + ".")
    packages = [
        "torch",
        "onnxruntime",
        "transformers",
        "timm",
        "torchvision",
        "pytorchcv",
        "diffusers",
        "torch-geometric",
        "peft",
        "monai",
        "torchaudio",
        "speechbrain",
        "asteroid",
        "vit-pytorch",
        "x-transformers",
        "segmentation-models-pytorch",
        "denoising-diffusion-pytorch",
        "conformer",
        "encodec",
    ]
    print(write_result("zoo", "Other people's architectures", "\n\n".join(body), packages))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "report"))
    parser.add_argument("models", nargs="*", help="parts of names; these are run again")
    parser.add_argument("--families", default="", help="separated by commas")
    parser.add_argument("--again", default="", help="outcomes that are run again, separated by commas")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--no-onnx", action="store_true", help="stop before the export, which takes most of the time; a later run does it")
    parser.add_argument("--no-torch-onnx", action="store_true", help="torch.onnx exports the float model only where our export fails")
    arguments = parser.parse_args()
    if arguments.step == "report":
        report()
    else:
        run(
            arguments.models,
            [x for x in arguments.families.split(",") if x],
            [x for x in arguments.again.split(",") if x],
            arguments.minutes,
            onnx=not arguments.no_onnx,
            torch_onnx=not arguments.no_torch_onnx,
        )


if __name__ == "__main__":
    main()
