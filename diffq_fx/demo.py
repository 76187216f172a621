"""The main job on real data, end to end: train, prepare, train on, convert, export, race against float.

``_run_task`` is the recipe. The data come inside pip packages, and the models are small.
"""

import copy
import json
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from diffq_fx.convert import convert_diffq
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.prepare import prepare_diffq
from diffq_fx.report import bits_report

CONTEXT = 64
"""Characters that the language model sees."""
BATCH_SIZE = 64
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Task:
    """Data, a model, and how many epochs it trains."""

    name: str
    make_model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    float_epochs: int
    compress_epochs: int

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training data in a new random order, in batches."""
        inputs, targets = self.train
        for index in torch.randperm(len(inputs), generator=generator).split(BATCH_SIZE):
            yield inputs[index], targets[index]

    def steps(self, epochs: int) -> int:
        """Batches in so many epochs."""
        return epochs * -(-len(self.train[0]) // BATCH_SIZE)


def run(*, out: Path, quick: bool = False) -> None:
    """Train, compress, export and race a convolutional net and a transformer on real data, and show what came of them.

    Args:
        out: folder for the ONNX files, the pictures and ``results.json``; made if it is not there.
        quick: fewer epochs, to see it work and not its accuracy.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    results = [_run_task(task, out, console) for task in (digits(quick), prose(quick))]
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(_table(results))
    console.print(f"ONNX files, pictures of where the bits went, and results.json are in {out}")


def _run_task(task: Task, out: Path, console: Console) -> dict[str, Any]:
    """One task's figures: accuracies in percent, sizes in MiB, latencies in ms at batch 1 with the quartiles of their ratio."""
    from diffq_fx.export import export_onnx
    from diffq_fx.export.onnx.benchmark import compare_latency

    torch.manual_seed(0)
    example = task.test[0][:1]
    ours, theirs = out / f"{task.name}.onnx", out / f"{task.name}-float.onnx"
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        model = task.make_model()
        bar = progress.add_task(f"{task.name}: train float", total=task.steps(task.float_epochs))
        train(model, task, task.float_epochs, LEARNING_RATE, lambda: progress.advance(bar))
        float_model = copy.deepcopy(model).eval()

        steps = task.steps(task.compress_epochs)
        prepared = prepare_diffq(model, example, DiffQConfig(target_bits=4, training_steps=steps))
        bar = progress.add_task(f"{task.name}: train prepared", total=steps)
        train(prepared, task, task.compress_epochs, LEARNING_RATE / 2, lambda: progress.advance(bar))

        bar = progress.add_task(f"{task.name}: convert, export, race", total=4)
        converted = convert_diffq(prepared)
        progress.advance(bar)
        export_onnx(converted, example, ours)
        progress.advance(bar)
        export_float(float_model, example, theirs)
        progress.advance(bar)
        race = compare_latency(theirs, ours, batch=1)
        progress.advance(bar)
    report = bits_report(prepared)
    report.save_picture(out / f"{task.name}-bits.png")
    return {
        "task": task.name,
        "accuracy_float": accuracy(float_model, task),
        "accuracy_prepared": accuracy(prepared.eval(), task),
        "accuracy_converted": accuracy(converted, task),
        "average_bits": report.average_bits_in_all,
        "mib_bit_packed": report.packed_size.total_mib,
        "race": {
            "accuracy_onnx": accuracy(_onnx_predictor(ours), task),
            "mib_onnx": ours.stat().st_size / 2**20,
            "mib_float_onnx": theirs.stat().st_size / 2**20,
            "latency_float": race.a_ms.median,
            "latency_ours": race.b_ms.median,
            "ratio": race.ratio.median,
            "ratio_q1": race.ratio.q1,
            "ratio_q3": race.ratio.q3,
        },
    }


def train(model: nn.Module, task: Task, epochs: int, learning_rate: float, on_step: Callable[[], None]) -> None:
    """Train a model by an ordinary loop; nothing in here knows whether it is prepared."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=task.steps(epochs))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for inputs, targets in task.batches(generator):
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            on_step()


@torch.no_grad()
def accuracy(predict: Callable[[Tensor], Tensor], task: Task) -> float:
    """Share of the test set that is predicted right, in percent."""
    inputs, targets = task.test
    hits = sum(int((predict(part).argmax(-1) == target).sum()) for part, target in zip(inputs.split(128), targets.split(128), strict=True))
    return 100 * hits / targets.numel()


def export_float(model: nn.Module, example: Tensor, path: Path) -> None:
    """The float model as torch exports it."""
    from diffq_fx.export.onnx.tracing import quiet

    two = torch.cat([example, example])  # a batch of one would be taken for a constant
    shapes = ({0: torch.export.Dim("batch")},)
    with quiet():
        torch.onnx.export(model, (two,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)


def _onnx_predictor(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    from diffq_fx.export import session_options

    session = onnxruntime.InferenceSession(path, session_options(path, exact=True), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.as_tensor(session.run(None, {name: inputs.numpy()})[0])


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="float against compressed (sizes in MiB, batch 1)")
    table.add_column("")
    for result in results:
        table.add_column(result["task"], justify="right")
    shown = [_shown(**result) for result in results]
    for title in shown[0]:
        table.add_row(
            title, *(each[title] for each in shown), end_section=title in ("bits per weight, scales included", "size, bit-packed")
        )
    return table


def _shown(*, race: dict[str, float], **figures: float) -> dict[str, str]:
    smaller = race["mib_float_onnx"] / race["mib_onnx"]
    return {
        "accuracy, float": f"{figures['accuracy_float']:.2f} %",
        "accuracy, prepared (eval)": f"{figures['accuracy_prepared']:.2f} %",
        "accuracy, converted": f"{figures['accuracy_converted']:.2f} %",
        "accuracy, ONNX (exact)": f"{race['accuracy_onnx']:.2f} %",
        "bits per weight, scales included": f"{figures['average_bits']:.2f}",
        "size, float ONNX": f"{race['mib_float_onnx']:.3f}",
        "size, our ONNX": f"{race['mib_onnx']:.3f}  ({smaller:.1f}x smaller)",
        "size, bit-packed": f"{figures['mib_bit_packed']:.3f}",
        "latency, float ONNX": f"{race['latency_float']:.3f} ms",
        "latency, our ONNX": f"{race['latency_ours']:.3f} ms",
        "float / ours": f"{race['ratio']:.2f} [{race['ratio_q1']:.2f}, {race['ratio_q3']:.2f}]",
    }


def digits_net() -> nn.Module:
    """A small convolutional net: class scores (N, 10) of images (N, 1, 8, 8)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128 * 4, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


class Block(nn.Module):
    """One causal transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to (N, T, width)."""
        n, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ProseModel(nn.Module):
    """A small transformer that predicts the next character; its embedding is tied to its head."""

    def __init__(self, characters: int, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, characters: Tensor) -> Tensor:
        """Scores (N, T, C) of the next character for ids (N, T)."""
        return self.head(self.norm(self.blocks(self.embedding(characters) + self.position)))


def digits(quick: bool = False) -> Task:
    """scikit-learn's 1,797 images of digits, a fifth of them for the test."""
    from sklearn.datasets import load_digits

    pixels, digit = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digit)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    epochs = (3, 3) if quick else (15, 12)
    return Task("digits", digits_net, (images[train], labels[train]), (images[test], labels[test]), *epochs)


def prose(quick: bool = False) -> Task:
    """The help texts that come with Python, by character; the last twentieth is for the test."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    code = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([code[character] for character in text])
    windows = ids[: (len(ids) - 1) // CONTEXT * CONTEXT + 1]
    inputs, targets = windows[:-1].view(-1, CONTEXT), windows[1:].view(-1, CONTEXT)
    split = len(inputs) * 19 // 20
    epochs = (1, 1) if quick else (3, 2)
    return Task("prose", lambda: ProseModel(len(code)), (inputs[:split], targets[:split]), (inputs[split:], targets[split:]), *epochs)
