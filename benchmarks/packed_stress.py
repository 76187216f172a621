"""What a packed file must survive: thousands of damaged and forged files, and saves that are killed.

A damaged file (bytes removed, added, replaced, swapped, cut) must be refused; a forged one, whose checksums fit, may load, but then as
tensors of the shapes that its header says. Whatever happens is one PackedFileError within bounded time and memory, and the model as it was.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks._damage import damage, forge_body, forge_header
from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, PackedFileError, convert, convert_diffq, prepare, prepare_diffq
from diffq_fx.export import load_packed, save_packed
from diffq_fx.methods import ProductQuantization

SLOWEST_S = 5.0


def make_model(seed: int) -> tuple[nn.Module, nn.Module]:
    """A float model, and a converted one: integers of 2 to 8 bits, for seed 2 a codebook."""
    torch.manual_seed(seed)
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 40))  # noqa: E731
    model = make()
    if seed == 2:
        return make(), convert(prepare(model, torch.randn(2, 3, 8, 8), ProductQuantization(entries=20, entry_dtype="int8")))
    with warnings.catch_warnings(action="ignore"):
        prepared = prepare_diffq(model, torch.randn(2, 3, 8, 8), DiffQConfig(group_size=8 if seed % 2 else "channel"))
        for quantizer in prepared.compression.quantizers:
            quantizer.logits.data.normal_()
        return make(), convert_diffq(prepared)


def forge(data: bytes, draw: random.Random) -> bytes:
    """A file with another header value or other bytes, under checksums that fit."""
    return (forge_body if draw.random() < 0.5 else forge_header)(data, draw)


def mutate(folder: Path, kind: str, number: int) -> list[object]:
    """Load many mutated files; any other end than the ones that are meant stops the run."""
    draw, path, change = random.Random(kind), folder / "mutated", damage if kind == "damaged" else forge
    sound = []
    for seed in range(4):
        model, converted = make_model(seed)
        sound.append((model, save_packed(converted, folder / f"sound{seed}", "bits" if seed == 3 else "entropy").read_bytes()))
    refused, slowest, base = 0, 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for turn in range(number):
        model, data = sound[turn % 4]
        path.write_bytes(change(data, draw))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        start = time.perf_counter()
        try:
            load_packed(model, path)
            if kind == "damaged":
                raise SystemExit(f"turn {turn}: a damaged file was loaded")
            model.load_state_dict(before)
        except PackedFileError:
            refused += 1
            if any(value.numpy().tobytes() != before[name].numpy().tobytes() for name, value in model.state_dict().items()):
                raise SystemExit(f"turn {turn}: the load was refused, and the model has changed") from None
        slowest = max(slowest, time.perf_counter() - start)
    if slowest > SLOWEST_S:
        raise SystemExit(f"a load took {slowest:.1f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    return [f"{kind} files", number, refused, number - refused, f"{1000 * slowest:.0f} ms", f"{grown:.0f} MiB"]


def kill(folder: Path, number: int) -> list[object]:
    """Kill a process that saves over and over, at a random moment; the file must always load as one of two models."""
    pairs = [make_model(seed) for seed in (0, 2)]
    path, draw = folder / "killed.safetensors", random.Random(0)
    save_packed(pairs[0][1], path)
    wanted = [load_packed(save_packed(converted, folder / f"wanted{i}")) for i, (_, converted) in enumerate(pairs)]
    seen, drafts = [0, 0], 0
    for _ in range(number):
        pid = os.fork()
        if not pid:
            try:
                for turn in range(10**9):
                    save_packed(pairs[turn % 2][1], path)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.002, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = load_packed(path)
        which = [all(torch.equal(found[name], value) for name, value in each.items()) for each in wanted]
        if sum(which) != 1:
            raise SystemExit("a killed save left neither the old nor the new file")
        seen[which.index(True)] += 1
        for draft in folder.glob(".diffq_fx.*"):
            drafts += 1
            shutil.rmtree(draft)
    return [f"{number} saves killed by signal 9", f"{seen[0]} times one model, {seen[1]} times the other, never anything else", drafts]


def main() -> None:
    """Run it all and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000, help="of each kind")
    parser.add_argument("--kills", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [mutate(Path(name), kind, arguments.mutations) for kind in ("damaged", "forged")]
        table = markdown_table(("what", "number", "refused", "loaded with the header's shapes", "slowest load", "memory grown by"), rows)
        killed = kill(Path(name), arguments.kills)
    kills = markdown_table(("what", "the file afterwards", "drafts left behind"), [killed])
    note = "A damaged file is never loaded; a forged one has checksums that fit. After every refusal the model was bit by bit as before."
    print(
        write_result(
            "packed_stress", "Packed files that are damaged, forged, or killed", f"{table}\n\n{note}\n\n{kills}", ["torch"]
        ).read_text()
    )


if __name__ == "__main__":
    main()
