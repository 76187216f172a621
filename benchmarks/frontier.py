"""Accuracy at an exact size, every system on the same real task from the same float model with the same number of steps.

    python benchmarks/frontier.py run cifar10 --data DIR --systems ours,lsq --bits 3,2   # resumes: what is there is kept
    python benchmarks/frontier.py report   # table and plot of all points

DIR holds the files that the task names if they are missing. Every point is one line of ``results/frontier_<task>.jsonl``.
"""

import argparse
import copy
import io
import json
import math
import statistics
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _models import ResNet20, Transformer
from _result import RESULTS, markdown_table, write_result
from torch import Tensor, nn

from diffq_fx import DiffQConfig, convert, model_size, prepare, reestimate_batch_norm
from diffq_fx.methods import LSQ, STE, Method, QuantNoise

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """Real data, a float model that is trained on it, and how long everybody trains on."""

    name: str
    score_name: str
    files: tuple[str, ...]
    steps: int
    rate: float

    def __init__(self, folder: Path) -> None:
        missing = [name for name in self.files if not (folder / name).exists()]
        if missing:
            raise SystemExit(f"{folder} lacks {', '.join(missing)}, which the task {self.name} reads: put them there.")
        self.load(folder)

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read the data and the float model."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What training makes small."""

    @abstractmethod
    def score(self, model: nn.Module) -> float:
        """On the whole test set."""

    float_model: nn.Module
    example: Tensor


class Cifar10(Task):
    """ResNet-20; images as JPEG, see the file's own note on what that costs."""

    name, score_name = "cifar10", "test accuracy in %"
    files = ("cifar10_jpeg.npz", "resnet20_cifar10_float.safetensors")
    steps, rate = 200, 1e-3
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def load(self, folder: Path) -> None:
        from PIL import Image
        from safetensors.torch import load_file

        archive = np.load(folder / self.files[0])

        def images(kind: str) -> Tensor:
            blob, offsets = archive[f"{kind}_blob"].tobytes(), archive[f"{kind}_off"]
            pictures = [np.asarray(Image.open(io.BytesIO(blob[a:b]))) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
            return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

        self.train = images("train"), torch.from_numpy(archive["train_y"].astype(np.int64))
        self.test = images("test"), torch.from_numpy(archive["test_y"].astype(np.int64))
        self.float_model = ResNet20()
        self.float_model.load_state_dict(load_file(folder / self.files[1]))
        self.float_model.to(memory_format=torch.channels_last)
        self.example = self._normalised(self.test[0][:4])

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        x, y = self.train
        while True:
            for pick in torch.randperm(len(x), generator=generator).split(128):
                padded = F.pad(x[pick].float(), (4, 4, 4, 4))
                top, left = (int(n) for n in torch.randint(9, (2,), generator=generator))
                cropped = padded[:, :, top : top + 32, left : left + 32]
                flipped = torch.where(torch.rand(len(pick), 1, 1, 1, generator=generator) < 0.5, cropped, cropped.flip(3))
                yield self._normalised(flipped), y[pick]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        x, y = self.test
        hits = sum(int((model(self._normalised(a)).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
        return 100 * hits / len(y)


class Text(Task):
    """A 6-layer byte-level transformer, 256 wide, on novels; the float model is trained here once and kept beside the results."""

    name, score_name = "text", "perplexity per byte"
    files = ("austen.txt",)
    steps, rate = 200, 5e-4
    float_steps = 600

    def load(self, folder: Path) -> None:
        raw = torch.from_numpy(np.frombuffer((folder / self.files[0]).read_bytes(), np.uint8).copy()).long()
        cut = int(0.95 * len(raw))
        self.train, self.test = raw[: int(0.9 * len(raw))], raw[cut : cut + 128 * 600]
        self.example = self.train[:256].view(2, 128)
        torch.manual_seed(0)
        self.float_model = Transformer(256, 256, 8, 6, causal=True)
        kept = RESULTS / ".frontier_text_float.pt"
        if kept.exists():
            self.float_model.load_state_dict(torch.load(kept))
        else:
            train(self, self.float_model, 0, self.float_steps, 1e-3)
            torch.save(self.float_model.state_dict(), kept)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - 129, (16,), generator=generator)
            rows = torch.stack([self.train[s : s + 129] for s in starts.tolist()])
            yield rows[:, :-1], rows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        rows = self.test.view(-1, 128)
        losses = [self.loss(model, (part[:, :-1], part[:, 1:])).item() for part in rows.split(50)]
        return math.exp(statistics.mean(losses))


TASKS: dict[str, type[Task]] = {task.name: task for task in (Cifar10, Text)}


def train(task: Task, model: nn.Module, seed: int, steps: int, rate: float, extra: Callable[[], Tensor] | None = None) -> None:
    """The same loop for all: AdamW, a rate that falls along a cosine."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for number, batch in enumerate(task.batches(seed)):
        if number == steps:
            break
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        (loss if extra is None else loss + extra()).backward()
        optimizer.step()
        scheduler.step()
        if number % 25 == 0:
            print(f"  step {number}: loss {loss.item():.3f}", end="\r", file=sys.stderr, flush=True)


Point = dict[str, float]


def ours(make: Callable[[float, int], Method], *, batch_norm: bool = False) -> Callable[[Task, float, int], Point]:
    """A method of this library: prepare, train, convert."""

    def run(task: Task, bits: float, seed: int) -> Point:
        model = prepare(copy.deepcopy(task.float_model), task.example, make(bits, task.steps))
        train(task, model, seed, task.steps, task.rate)
        if batch_norm:
            reestimate_batch_norm(model, (x for (x, _), _ in zip(task.batches(seed + 1), range(10), strict=False)))
        return {"mib": model_size(model, exact=True), "score": task.score(convert(model))}

    return run


def diffq_peer(task: Task, bits: float, seed: int) -> Point:
    """diffq 0.2.4 as its README has it, groups of 8; its penalty is found by trying, since it has no target."""
    import diffq

    penalty = {4: 0.3, 3: 1.0, 2: 5.0}.get(round(bits), 1.0) * (10 if task.name == "cifar10" else 1)
    model = copy.deepcopy(task.float_model)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=1e-4)
    quantizer = diffq.DiffQuantizer(model, group_size=8, min_size=0.001)
    quantizer.setup_optimizer(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    model.train()
    for number, batch in enumerate(task.batches(seed)):
        if number == task.steps:
            break
        optimizer.zero_grad()
        (task.loss(model, batch) + penalty * quantizer.model_size()).backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    return {"mib": float(quantizer.true_model_size()), "score": task.score(model)}


def float_reference(task: Task, bits: float, seed: int) -> Point:
    """The float model as it was given."""
    return {"mib": sum(p.numel() for p in task.float_model.parameters()) * 4 / 2**20, "score": task.score(task.float_model.eval())}


def float_trained_on(task: Task, bits: float, seed: int) -> Point:
    """The float model after as many steps as the others."""
    model = copy.deepcopy(task.float_model)
    train(task, model, seed, task.steps, task.rate)
    return {"mib": sum(p.numel() for p in model.parameters()) * 4 / 2**20, "score": task.score(model.eval())}


SYSTEMS: dict[str, Callable[[Task, float, int], Point]] = {
    "float": float_reference,
    "float, trained on": float_trained_on,
    "ours": ours(lambda bits, steps: DiffQConfig(target_bits=bits, training_steps=steps, min_bits=1)),
    "ours, half of it rounding": ours(
        lambda bits, steps: DiffQConfig(target_bits=bits, training_steps=steps, min_bits=1, rounding_share=0.5)
    ),
    "ours, noise alone": ours(lambda bits, steps: DiffQConfig(target_bits=bits, min_bits=1)),
    "ours, noise alone, batch norm again": ours(lambda bits, steps: DiffQConfig(target_bits=bits, min_bits=1), batch_norm=True),
    "ours, widths 2, 4, 8": ours(lambda bits, steps: DiffQConfig(target_bits=bits, training_steps=steps, widths=(2, 4, 8))),
    "ste": ours(lambda bits, steps: STE(bits=round(bits))),
    "lsq": ours(lambda bits, steps: LSQ(bits=round(bits))),
    "quant-noise": ours(lambda bits, steps: QuantNoise(bits=round(bits), rate=0.5)),
    "diffq 0.2.4": diffq_peer,
}


def points_of(task: str) -> list[dict]:
    """All points measured so far."""
    path = RESULTS / f"frontier_{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(asked: argparse.Namespace) -> None:
    """Measure the points that are missing."""
    warnings.simplefilter("ignore")
    task = TASKS[asked.task](asked.data)
    task.steps = asked.steps or task.steps
    there = {(p["system"], p["bits"], p["seed"], p["steps"]) for p in points_of(task.name)}
    for seed in range(asked.seeds):
        for bits in (float(each) for each in asked.bits.split(",")):
            for system in asked.systems.split(","):
                key = (system, 32.0 if system.startswith("float") else bits, seed, 0 if system == "float" else task.steps)
                if key in there:
                    continue
                begin = time.monotonic()
                found = SYSTEMS[system](task, bits, seed)
                there.add(key)
                names = ("system", "bits", "seed", "steps")
                point = {**dict(zip(names, key, strict=True)), **found, "seconds": round(time.monotonic() - begin)}
                with (RESULTS / f"frontier_{task.name}.jsonl").open("a") as file:
                    file.write(json.dumps(point) + "\n")
                print(point, flush=True)


def report(asked: argparse.Namespace) -> None:
    """Tables and plots of all points."""
    for name, kind in TASKS.items():
        points = points_of(name)
        if not points:
            continue
        groups: dict[tuple, list[dict]] = {}
        for point in points:
            groups.setdefault((point["system"], point["bits"], point["steps"]), []).append(point)
        rows = []
        for (system, bits, steps), found in sorted(groups.items(), key=lambda item: (-item[0][1], item[0][0])):
            scores = [point["score"] for point in found]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            budget = "" if bits == 32 else f"{bits:g}"
            rows.append(
                [
                    system,
                    budget,
                    steps,
                    f"{statistics.mean(p['mib'] for p in found):.4f}",
                    f"{statistics.mean(scores):.2f}{spread}",
                    len(found),
                ]
            )
        header = ("system", "bits asked for", "steps", "MiB, exact", kind.score_name, "seeds")
        title = f"Frontier: {name}"
        path = write_result(f"frontier_{name}", title, markdown_table(header, rows) + f"\n\n{kind.__doc__}", ["torch"])
        _draw(groups, kind, path.with_suffix(".png"))
        print(path.read_text())


def _draw(groups: dict[tuple, list[dict]], kind: type[Task], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    by_system: dict[str, list[tuple[float, float]]] = {}
    for (system, _, _), found in groups.items():
        mean = statistics.mean(p["mib"] for p in found), statistics.mean(p["score"] for p in found)
        by_system.setdefault(system, []).append(mean)
    for system, marker in zip(by_system, "osD^vP*Xp<>h", strict=False):
        if system.startswith("float"):
            axes.axhline(by_system[system][0][1], color="grey", linestyle=":" if "on" in system else "--", label=system)
        else:
            axes.plot(*zip(*sorted(by_system[system]), strict=True), marker=marker, label=system, linewidth=1)
    axes.set(xlabel="exact size in MiB", ylabel=kind.score_name, title=kind.name)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run points or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("task", choices=TASKS)
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--systems", default=",".join(SYSTEMS))
    runs.add_argument("--bits", default="4,3,2")
    runs.add_argument("--seeds", type=int, default=1)
    runs.add_argument("--steps", type=int, help="other than the task's own")
    runs.set_defaults(call=run)
    commands.add_parser("report").set_defaults(call=report)
    asked = parser.parse_args()
    asked.call(asked)


if __name__ == "__main__":
    main()
