"""Codebook and product-quantized weights in ONNX: looked up once at load, as our files are, or at every run.

Both are the same file. onnxruntime looks the weights up when it makes the session, since ``Gather(codebook, codes)`` hangs on constants
alone; with its pass ConstantFolding off it does so at every run. The control is what that pass is worth to the float model. The weights
are random, which neither speed nor size see.

    python -m benchmarks.codebook_latency build --folder DIR    # write the files
    python -m benchmarks.codebook_latency race --folder DIR     # time them
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks._models import Transformer
from benchmarks._result import markdown_table, write_result
from benchmarks._train_systems import interleaved, quartiles
from diffq_fx import convert, prepare
from diffq_fx.demo.race import export_float
from diffq_fx.export import export_onnx, session_options
from diffq_fx.methods import LC, Method, ProductQuantization
from recipes.models.cifar import ResNet18

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "encoder (6 x 384, 8192 tokens, 32 rows)": (
        lambda: Transformer(8192, 384, 12, 6, causal=False),
        torch.randint(8192, (1, 32)),
        30,
    ),
    "ResNet-18 (224 x 224)": (ResNet18, torch.randn(1, 3, 224, 224), 6),
}
METHODS: dict[str, Method] = {
    "LC, K=16": LC(entries=16),
    "product quantization, K=256": ProductQuantization(entries=256, iterations=3, min_size=10_000),
    "product quantization, K=256, int8": ProductQuantization(entries=256, iterations=3, min_size=10_000, entry_dtype="int8"),
}


def load(path: Path, options: onnxruntime.SessionOptions, without: Sequence[str] = ()) -> tuple[onnxruntime.InferenceSession, float]:
    """A session, and the milliseconds that it took to make."""
    began = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, disabled_optimizers=list(without))
    return session, 1000 * (time.perf_counter() - began)


def build(title: str, folder: Path) -> None:
    """Write the float file and one for each method."""
    make, example, _ = MODELS[title]
    torch.manual_seed(0)
    model = make().eval()
    export_float(model, example, folder / f"{title}.onnx")
    for name, method in METHODS.items():
        path = folder / f"{title}, {name}.onnx"
        if not path.exists():
            export_onnx(convert(prepare(model, example, method)), example, path)


def race(title: str, folder: Path) -> list[tuple[str, ...]]:
    """One row for each method: files, loads, latencies."""
    _, example, rounds = MODELS[title]
    float_path = folder / f"{title}.onnx"
    rows = []
    for name in METHODS:
        path = folder / f"{title}, {name}.onnx"
        loaded = {
            "float": load(float_path, onnxruntime.SessionOptions()),
            "float, nothing folded": load(float_path, onnxruntime.SessionOptions(), ["ConstantFolding"]),
            "at load": load(path, session_options(path)),
            "per run": load(path, session_options(path), ["ConstantFolding"]),
        }
        steps = {key: partial(session.run, None, {session.get_inputs()[0].name: example.numpy()}) for key, (session, _) in loaded.items()}
        once, each = (np.asarray(steps[key]()[0]) for key in ("at load", "per run"))
        if np.abs(once - each).max() > 1e-4 * np.abs(once).max():
            raise RuntimeError(f"{title}, {name}: the two forms differ.")
        seconds = interleaved(steps, rounds, warm_up=3)
        slower = [quartiles(seconds[key], seconds["float"]) for key in ("at load", "per run", "float, nothing folded")]
        sizes = " / ".join(f"{each.stat().st_size / 2**20:.2f}" for each in (float_path, path))
        loads = " / ".join(f"{loaded[key][1]:.0f}" for key in ("float", "at load", "per run"))
        times = [f"{median:.2f} [{q1:.2f}, {q3:.2f}]" for q1, median, q3 in slower]
        rows.append((title, name, sizes, f"{1000 * statistics.median(seconds['float']):.1f}", *times, loads))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Build, or measure and write the result file."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "race"))
    parser.add_argument("--folder", type=Path, required=True, help="where the files are kept")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.what == "build":
        for title in MODELS:
            build(title, asked.folder)
        return
    rows = [row for title in MODELS for row in race(title, asked.folder)]
    times = ("looked up at load, times float", "at every run, times float", "control: float, nothing folded")
    header = ("model", "weights", "MiB float / ours", "float, ms", *times, "ms to load: float / at load / per run")
    command = "python -m benchmarks.codebook_latency race --folder DIR"
    title = "Codebooks in ONNX, looked up at load or at every run"
    path = write_result("codebook_latency", title, markdown_table(header, rows), ["torch", "onnxruntime"], command=command)
    print(path.read_text())


if __name__ == "__main__":
    main()
