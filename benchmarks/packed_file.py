"""The packed file: its size against bit packing, entropy, zstd and diffq's files; its speed against diffq's restore and torch.load.

Weights are drawn from a normal distribution and the bits at random, the same for diffq and for us: groups of 8, 2 to 15 bits, about 5 on
average, on the paper's grid. Our default, bits for each output channel, comes in rows of its own. What is loaded is the plain float model.

Of nncodec only the coder is used (DeepCABAC, on the same integers counted from zero): its package pins other versions of numpy and torch.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks._models import minilm_size
from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, IntegerWeight, convert_diffq, prepare_diffq
from diffq_fx.export.packed import load_packed, save_packed
from recipes.models.cifar import ResNet18

MIB = 2**20


def demucs_size() -> nn.Module:
    """As many weights as Demucs, in 16 square layers: 268 M."""
    return nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(16)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "resnet18": (ResNet18, lambda: torch.randn(1, 3, 32, 32)),
    "minilm": (minilm_size, lambda: torch.randint(0, 30522, (1, 16))),
    "demucs": (demucs_size, lambda: torch.randn(1, 4096)),
}


def make_float(name: str) -> nn.Module:
    """The model with normal weights."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def logits_like(logits: torch.Tensor) -> torch.Tensor:
    """Logits of about 5 bits between 2 and 15."""
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(logits.numel())) * 0.5 - 1.2


def make_converted(name: str, config: DiffQConfig) -> nn.Module:
    """The model with integer weights."""
    with warnings.catch_warnings(action="ignore"):
        prepared = prepare_diffq(make_float(name), MODELS[name][1](), config)
        for quantizer in prepared.compression.quantizers:
            quantizer.logits.data.copy_(logits_like(quantizer.logits))
        return convert_diffq(prepared)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def weights_of(model: nn.Module) -> list[IntegerWeight]:
    """Every stored weight once."""
    return list({id(m): m for m in model.modules() if isinstance(m, IntegerWeight)}.values())


def entropy_bits(values: np.ndarray) -> float:
    """Order-0 entropy of all values together."""
    counts = np.bincount(values.reshape(-1))
    counts = counts[counts > 0]
    return float(counts @ np.log2(counts.sum() / counts))


def ideal_bytes(model: nn.Module) -> tuple[float, float, float]:
    """Bit-packed levels, their order-0 entropy (each weight and width by itself), and widths at their entropy with scales."""
    packed = entropy = side = 0.0
    for weight in weights_of(model):
        levels, bits = weight.levels_OI().numpy(), weight.bits.numpy()
        each = np.broadcast_to(weight.spec.bits_layout.expand(weight.bits).numpy(), levels.shape)
        packed += weight.footprint().payload_bits / 8
        entropy += sum(entropy_bits(levels[each == width]) for width in np.unique(bits)) / 8
        ranges = weight.spec.range_layout.num_groups
        per_range = 4 + (4 if weight.offset is not None else 0)
        zero_points = weight.bits.float().sum().item() / 8 if weight.zero_point is not None and ranges == bits.size else 0
        side += entropy_bits(bits) / 8 + per_range * ranges + zero_points
    return packed, entropy, side


def context_bytes(model: nn.Module) -> dict[str, float]:
    """Levels at their entropy given a context, with what its tables take: half a log2 of the count for each level that occurs."""
    found = dict.fromkeys(("no context", "the row's spread", "the left neighbour's size"), 0.0)
    for weight in weights_of(model):
        levels = weight.levels_OI().numpy()
        each = np.broadcast_to(weight.spec.bits_layout.expand(weight.bits).numpy(), levels.shape).astype(np.int64)
        size = np.abs((levels - zero_levels(weight).numpy()) * np.exp2(1.0 - each))
        left = np.concatenate([np.ones((len(size), 1)), size[:, :-1]], 1)
        contexts = dict(zip(found, (np.ones_like(size), size.mean(1, keepdims=True) * np.ones_like(size), left), strict=True))
        for name, value in contexts.items():
            key = each * 16 + np.clip(-2 * np.log2(np.maximum(value, 1e-9)), 0, 15).astype(np.int64)
            for of_context in np.unique(key):
                some = levels[key == of_context]
                found[name] += (entropy_bits(some) + np.log2(len(some)) / 2 * (len(np.unique(some)) - 1)) / 8
    return found


def zero_levels(weight: IntegerWeight) -> torch.Tensor:
    """The level that stands for zero, or is next to it, for every weight."""
    zero = weight.zero_point if weight.zero_point is not None else torch.round(-weight.offset / weight.scale).int()
    return weight.spec.scale_layout.expand(zero)


def plain_bytes(path: Path) -> int:
    """What the file holds beside quantized weights: parameters and buffers as they are."""
    from diffq_fx.export.packed.packed_report import inspect_packed

    return sum(tensor.stored_bytes for tensor in inspect_packed(path).tensors)


def measure_load(name: str, path: Path) -> dict[str, float]:
    """Load in a process of its own, which sees its own peak of memory."""
    command = [sys.executable, "-m", "benchmarks.packed_file", "--load", name, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def load_here(name: str, path: str) -> None:
    """Print, as JSON, how long loading takes, and the peak of memory with the model in it, over a process that has loaded a small one."""

    def status(key: str) -> float:
        return next(int(line.split()[1]) * 1024.0 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        small = nn.Linear(64, 64)
        file = save_packed(convert_diffq(prepare_diffq(small, torch.zeros(1, 64))), Path(folder) / "small.safetensors")
        load_packed(nn.Linear(64, 64), file)
    before = status("VmRSS")
    model = make_float(name)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    load_packed(model, path)
    peak = status("VmHWM") - before
    best = seconds(lambda: load_packed(model, path), 10)
    print(json.dumps({"seconds": best, "float_bytes": size, "peak": peak / size}))


def diffq_rows(name: str, folder: Path, repeats: int) -> tuple[list[tuple[str, str]], float]:
    """Sizes of diffq's files for the same bits, and the time of its restore."""
    import diffq

    model = make_float(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizer = diffq.DiffQuantizer(model, group_size=8, min_size=0.01, min_bits=2, max_bits=15)
    quantizer.setup_optimizer(optimizer)
    for key, parameter in model.named_parameters():
        if key.endswith("_diffq"):
            parameter.data.copy_(logits_like(parameter))
    model.eval()
    state = quantizer.get_quantized_state()
    torch.save(state, folder / "diffq.th")
    compressed = len(zlib.compress((folder / "diffq.th").read_bytes(), 6))
    rows = [
        ("diffq, packed state by torch.save", mib((folder / "diffq.th").stat().st_size)),
        ("the same, compressed by zlib", mib(compressed)),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        restore = seconds(lambda: quantizer.restore_quantized_state(copy.copy(state)), repeats)
    return rows, restore


def nncodec_bytes(model: nn.Module) -> int:
    """What DeepCABAC makes of the levels, each weight by itself, counted from the level that stands for zero."""
    folder = Path(importlib.util.find_spec("nncodec").origin).parent / "extensions"  # type: ignore[union-attr, arg-type]
    spec = importlib.util.spec_from_file_location("deepCABAC", next(folder.glob("deepCABAC*.so")))
    coder = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(coder)  # type: ignore[union-attr]
    total = 0
    for weight in weights_of(model):
        levels = (weight.levels_OI() - zero_levels(weight)).to(torch.int32).contiguous().numpy()
        encoder = coder.Encoder()
        encoder.initCtxModels(11, 0)
        skipped = np.zeros(len(levels), np.int32)
        encoder.encodeLayer(levels, 0, 0, 0, 0, 0, skipped, coder.HdspMode.AlwaysOff, np.zeros(0, np.int8), 0, 0)
        total += len(encoder.finish())
    return total


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / MIB:.3f}"


def plain_load(name: str, folder: Path) -> tuple[int, float]:
    """Bytes of the float model, and the time of torch.load into it."""
    model = make_float(name)
    torch.save(model.state_dict(), folder / "float.pt")
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return size, seconds(lambda: model.load_state_dict(torch.load(folder / "float.pt")), 10)


def our_rows(name: str, groups: str, config: DiffQConfig, folder: Path, restore: float) -> tuple[list[tuple], list[tuple]]:
    """Sizes and speeds of the packed file; beside them the ideal sizes of small models."""
    import zstandard

    sizes, speed, converted = [], [], make_converted(name, config)
    is_large = name == "demucs"
    packed, entropy, side = (0.0, 0.0, 0.0) if is_large else ideal_bytes(converted)
    for compression in ("bits", "entropy"):
        path = folder / f"{compression}.safetensors"
        start = time.perf_counter()
        save_packed(converted, path, compression)
        save = time.perf_counter() - start
        loaded, size = measure_load(name, path), path.stat().st_size
        ratio = "" if is_large else f"{size / (entropy + side + plain_bytes(path)):.4f}"
        sizes.append((groups, f"packed file, {compression}", mib(size), ratio))
        rate, faster = loaded["float_bytes"] / loaded["seconds"] / 1e9, restore / loaded["seconds"]
        cells = (f"{save:.2f}", f"{loaded['seconds']:.3f}", f"{rate:.2f}", f"{faster:.1f}" if restore else "", f"{loaded['peak']:.2f}")
        speed.append((groups, f"load_packed, {compression}", *cells))
    if not is_large:
        kinds = {bits: np.uint16 if bits > 8 else np.uint8 for bits in range(17)}
        levels = b"".join(w.levels_OI().numpy().astype(kinds[w.container_bits]).tobytes() for w in weights_of(converted))
        sizes += [
            (groups, "levels alone, bit-packed", mib(packed), ""),
            (groups, "levels alone, order-0 entropy", mib(entropy), ""),
            (groups, "levels alone, zstd -9 of a byte or two each", mib(len(zstandard.ZstdCompressor(level=9).compress(levels))), ""),
            (groups, "levels alone, nncodec's DeepCABAC", mib(nncodec_bytes(converted)), ""),
            *((groups, f"levels alone, entropy and tables given {name}", mib(size), "") for name, size in context_bytes(converted).items()),
            (groups, "widths, scales and zero points at their entropy", mib(side), ""),
        ]
    return sizes, speed


def compare(name: str, folder: Path) -> str:
    """One model's tables."""
    sizes, restore = [], 0.0
    float_bytes, plain = plain_load(name, folder)
    speed = [("float", "torch.load and load_state_dict", "", f"{plain:.3f}", f"{float_bytes / plain / 1e9:.2f}", "", "")]
    configs = {"groups of 8": DiffQConfig.paper(penalty=None, group_size=8), "channels": DiffQConfig()}
    if name == "demucs":  # one float for each group of 8 and several copies of it would not fit
        del configs["groups of 8"]
    else:
        rows, restore = diffq_rows(name, folder, 10)
        sizes += [("groups of 8", *row, "") for row in rows]
        speed.append(("groups of 8", "diffq's restore", "", f"{restore:.3f}", f"{float_bytes / restore / 1e9:.3f}", "1", ""))
    for groups, config in configs.items():
        more_sizes, more_speed = our_rows(name, groups, config, folder, restore)
        sizes += more_sizes
        speed += more_speed
    size_table = markdown_table(("bits for", "what", "MiB", "of entropy, widths, scales and plain tensors"), sizes)
    header = ("bits for", "load", "save s", "load s", "GB/s of float32", "times diffq's speed", "peak memory / float model")
    return f"## {name}: {mib(float_bytes)} MiB of float32\n\n{size_table}\n\n{markdown_table(header, speed)}"


def main() -> None:
    """Compare the chosen models and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet18", "minilm"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--load", nargs=2, metavar=("MODEL", "FILE"), help="measure one load in this process")
    arguments = parser.parse_args()
    if arguments.load:
        load_here(*arguments.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        body = "\n\n".join(compare(name, Path(folder)) for name in arguments.models)
    name = "packed_file_" + "_".join(arguments.models)
    print(
        write_result(name, "The packed file: size and speed", body, ["torch", "numpy", "isal", "diffq", "nncodec", "zstandard"]).read_text()
    )


if __name__ == "__main__":
    main()
