"""A small convolutional net for digits: trained from scratch, prepared, trained on, converted and exported."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffq_fx.convert import convert_diffq
from diffq_fx.demo.race import Contest, export_float
from diffq_fx.export import export_onnx
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.prepare import prepare_diffq
from diffq_fx.report import bits_report

BATCH_SIZE = 64
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Task:
    """Data, and how many epochs a model trains."""

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


def contest(out: Path, quick: bool, tell: Callable[[str], None]) -> Contest:
    """Train the net in float, compress it by training, and write the files that race."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    task = digits(quick)
    inputs, _ = task.test
    model = digits_net()
    train(model, task, task.float_epochs, LEARNING_RATE)
    float_model = copy.deepcopy(model).eval()
    tell(f"trained in float: {accuracy(float_model, task):.2f} % of {len(inputs)} test images")

    prepared = prepare_diffq(model, inputs[:1], DiffQConfig(target_bits=4, training_steps=task.steps(task.compress_epochs)))
    train(prepared, task, task.compress_epochs, LEARNING_RATE / 2)
    converted = convert_diffq(prepared)
    report = bits_report(converted)
    tell(f"compressed: {report.average_bits_in_all:.2f} bits a weight, scales included")

    files = {"float": out / "digits-float.onnx", "diffq_fx, 4 bits": out / "digits.onnx"}
    source, ours = files.values()
    export_float(float_model, inputs, source)
    export_onnx(converted, inputs[:1], ours)
    tell("exported; two files race")
    return Contest(
        title="a net for digits in onnxruntime; ms: median [quartiles] of runs in turns",
        files=files,
        inputs=(inputs,),
        unit="image",
        scores=lambda outputs_of: {"accuracy": f"{accuracy(outputs_of, task):.2f} %"},
        report=report,
    )


def train(model: nn.Module, task: Task, epochs: int, learning_rate: float) -> None:
    """Train a model by an ordinary loop; nothing in here knows whether it is prepared."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=task.steps(epochs))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for inputs, targets in task.batches(generator):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


@torch.no_grad()
def accuracy(predict: Callable[[Tensor], Tensor], task: Task) -> float:
    """Share of the test set that is predicted right, in percent."""
    inputs, targets = task.test
    return 100 * float((predict(inputs).argmax(-1) == targets).float().mean())


def digits_net() -> nn.Module:
    """A small convolutional net: class scores (N, 10) of images (N, 1, 8, 8)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128 * 4, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def digits(quick: bool = False) -> Task:
    """scikit-learn's 1,797 images of digits, a fifth of them for the test."""
    from sklearn.datasets import load_digits

    pixels, digit = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digit)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    epochs = (3, 3) if quick else (15, 12)
    return Task((images[train], labels[train]), (images[test], labels[test]), *epochs)
