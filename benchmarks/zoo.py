"""Architectures of other people's libraries, each through everything: prepare, train, eval, convert, packed file, ONNX at another batch.

    python -m benchmarks.zoo run --minutes 60            # goes on where it stopped; --families and names choose
    python -m benchmarks.zoo run --again failed          # what ended so is run again
    python -m benchmarks.zoo run --until prepare         # measures that step anew
    python -m benchmarks.zoo report                      # the table
    python -m benchmarks.zoo full-size                   # prepare beside forwards, of models as large as libraries make them by default

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
import time
import traceback
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch

from benchmarks._result import RESULTS
from benchmarks._zoo_report import write_full_size, write_report
from benchmarks.zoo_models import architectures, import_libraries
from benchmarks.zoo_models.entry import Architecture
from benchmarks.zoo_models.full_size import ARCHITECTURES
from benchmarks.zoo_models.steps import Measured, Until, measure, resident

LINES = RESULTS / "zoo.jsonl"
SECONDS, GIB = 240, 6
BEFORE_PREPARE = ("build", "float step")


def known() -> dict[str, dict[str, Any]]:
    """The last line of each model."""
    lines = LINES.read_text().splitlines() if LINES.exists() else []
    return {line["model"]: line for line in map(json.loads, lines)}


def key_of(entry: Architecture) -> str:
    return f"{entry.library}: {entry.name}"


def run(names: list[str], families: list[str], again: list[str], minutes: float, *, until: Until, torch_onnx: bool) -> None:
    """Run what has no line yet, a family at a time, until the time is over."""
    import_libraries()
    _export_once()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all pages of the libraries
    end, unfinished = time.monotonic() + 60 * minutes, {None, *again, *(["without ONNX"] if until == "onnx" else [])}
    for entry in architectures():
        key = key_of(entry)
        if (names and not any(name in key for name in names)) or (families and entry.family not in families):
            continue
        if time.monotonic() > end:
            print("the time is over")
            return
        before = known().get(key, {})  # another process may have run it
        if until == "prepare" and before.get("outcome") not in ("whole", "all but ONNX"):
            continue
        if until != "prepare" and not names and before.get("outcome") not in unfinished:
            continue
        line = in_own_process(entry, until=until, torch_onnx=torch_onnx)
        if until == "prepare" and line["outcome"] == "without ONNX":  # it did not fail
            line = {**before, "forward_seconds": line["forward_seconds"], "seconds": before["seconds"] | line["seconds"]}
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{key}: {line['outcome']} {line.get('step', '')} {line.get('message', '')[:300]}", flush=True)


def full_size(names: list[str]) -> None:
    """Prepare models as large as people use: in the others' few milliseconds what prepare does once for each module is most of it."""
    import_libraries()
    chosen = [entry for entry in ARCHITECTURES if not names or any(name in key_of(entry) for name in names)]
    lines = []
    for entry in chosen:
        lines.append(in_own_process(entry, until="prepare", torch_onnx=False))
        print(f"{key_of(entry)}: {lines[-1].get('message', 'prepared')[:300]}", flush=True)
    write_full_size(lines)


def _export_once() -> None:
    """What the first export imports and fills is there before any is timed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(4, 4), (torch.zeros(2, 4),), dynamo=True, verbose=False)
    import onnxruntime  # noqa: F401


def in_own_process(entry: Architecture, *, until: Until, torch_onnx: bool) -> dict[str, Any]:
    """Fork, measure there, and read the line that comes back; a process that ends without one was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        line = _measured(entry, until=until, torch_onnx=torch_onnx)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(line))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    line = json.loads(text) if text else {"outcome": "failed", "message": f"the process ended with status {status}"}
    return {"model": key_of(entry), "library": entry.library, "name": entry.name, "family": entry.family, **line}


def _measured(entry: Architecture, *, until: Until, torch_onnx: bool) -> dict[str, Any]:
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
        measure(entry, measured, torch_first=zlib.crc32(entry.name.encode()) % 2 == 0, until=until, torch_onnx=torch_onnx)
    except Exception as error:  # noqa: BLE001  other people's code and ours: whatever ends a model is its result
        return {**measured.found, **_outcome(error, measured.at)}
    return {**measured.found, "outcome": "whole" if until == "onnx" else "without ONNX"}


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


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "report", "full-size"))
    parser.add_argument("models", nargs="*", help="parts of names; these are run again")
    parser.add_argument("--families", default="", help="separated by commas")
    parser.add_argument("--again", default="", help="outcomes that are run again, separated by commas")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--until",
        choices=("prepare", "packed", "onnx"),
        default="onnx",
        help="packed: without the export, which a later run does; prepare: measures models anew that ran before, up to that step",
    )
    parser.add_argument("--no-torch-onnx", action="store_true", help="torch.onnx exports the float model only where our export fails")
    arguments = parser.parse_args()
    if arguments.step == "report":
        chosen = {key_of(entry) for entry in architectures()}
        write_report([line for name, line in known().items() if name in chosen])
    elif arguments.step == "full-size":
        full_size(arguments.models)
    else:
        run(
            arguments.models,
            [x for x in arguments.families.split(",") if x],
            [x for x in arguments.again.split(",") if x],
            arguments.minutes,
            until=arguments.until,
            torch_onnx=not arguments.no_torch_onnx,
        )


if __name__ == "__main__":
    main()
