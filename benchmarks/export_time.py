"""Export of a decoder: processor time and peak memory of export_onnx beside torch.onnx's own export of the float model.

Every export runs in a process of its own, with the model loaded and everything imported before the clock starts. Memory is the process's
largest resident set from then on, less what it was before the model was made, as a multiple of the float model's bytes. What glibc keeps of
freed memory when the clock starts is given back first, and so is not counted for any system.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._result import markdown_table, write_result

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
"""SmolLM2-135M's."""
EXAMPLE = (2, 16)
SYSTEMS = ("torch.onnx", "torch.onnx, not optimized", "ours", "ours, not verified", "ours, with cache")


def load(arguments: argparse.Namespace) -> nn.Module:
    """The model of a folder, or a random one of SmolLM2's shape."""
    import transformers

    if arguments.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        config = transformers.LlamaConfig(vocab_size=arguments.vocabulary, num_hidden_layers=arguments.layers, **SHAPE)
        model = transformers.LlamaForCausalLM(config)
    model.config.use_cache = False
    return model.eval()


def job(system: str, model: nn.Module, path: Path) -> Callable[[], object]:
    """What is measured; what comes before it, such as rounding, is done here."""
    ids = torch.randint(1000, EXAMPLE)
    if system.startswith("torch.onnx"):
        sizes = {"input_ids": dict.fromkeys((0, 1), torch.export.Dim.AUTO)}
        options: dict[str, Any] = {"dynamic_shapes": sizes, "optimize": system == "torch.onnx", "verbose": False}
        return lambda: torch.onnx.export(model, (), path, kwargs={"input_ids": ids}, dynamo=True, **options)
    import diffq_fx
    from diffq_fx.export import export_onnx
    from diffq_fx.methods import STE

    converted = diffq_fx.convert(diffq_fx.prepare(model, {"input_ids": ids}, STE(bits=4)))
    return lambda: export_onnx(
        converted, {"input_ids": ids}, path, verify=system != "ours, not verified", cache=system == "ours, with cache"
    )


def resident(entry: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Export once in this process."""
    import onnx  # noqa: F401  not to be timed
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before = resident("VmRSS")
    model = load(arguments)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        export = job(arguments.one, model, Path(folder, "model.onnx"))
        del model
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
        start, wall = time.process_time(), time.perf_counter()
        export()
        taken = {"seconds": time.process_time() - start, "wall": time.perf_counter() - wall}
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {**taken, "peak": resident("VmHWM") - before, "weights": weights, "file": size}


def main() -> None:
    """Measure all systems in turns and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="a folder of transformers; without it a random model of SmolLM2-135M's shape")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for _ in range(arguments.turns):
        for system, results in found.items():
            command = [sys.executable, "-m", "benchmarks.export_time", *sys.argv[1:], "--one", system]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(run.stdout.splitlines()[-1]))
            print(system, results[-1], flush=True)
    middle = {system: {key: statistics.median(each[key] for each in results) for key in results[0]} for system, results in found.items()}
    base = middle["torch.onnx"]["seconds"]
    table = [
        (system, f"{m['seconds']:.1f}", f"{m['seconds'] / base:.2f}", f"{m['peak'] / m['weights']:.2f}", f"{m['file'] / 2**20:.1f}")
        for system, m in middle.items()
    ]
    header = ("export", "processor time, s", "beside torch.onnx", "peak memory beside the float weights", "MiB written")
    title = f"Export of a decoder of {middle['ours']['weights'] / 4e6:.0f} M weights, medians of {arguments.turns} runs"
    print(write_result("export_time", title, markdown_table(header, table), ["torch", "onnx", "onnxscript", "transformers"]).read_text())


if __name__ == "__main__":
    main()
