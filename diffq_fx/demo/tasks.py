"""The demo's two tasks: real data that comes inside pip packages, and a small model for each."""

import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 64
"""Characters that the language model sees."""


@dataclass(frozen=True)
class Task:
    """Data, a model, and how many epochs it trains."""

    name: str
    make_model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    float_epochs: int
    compress_epochs: int
    learning_rate: float

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The training data in a new random order, in batches."""
        inputs, targets = self.train
        for index in torch.randperm(len(inputs), generator=generator).split(self.batch_size):
            yield inputs[index], targets[index]

    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.train[0]) // self.batch_size)


class DigitsNet(nn.Module):
    """A small convolutional net for 8x8 images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(128)
        self.hidden = nn.Linear(128 * 4, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores (N, 10) of images (N, 1, 8, 8)."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


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
    return Task("digits", DigitsNet, (images[train], labels[train]), (images[test], labels[test]), 64, *epochs, 2e-3)


def prose(quick: bool = False) -> Task:
    """The help texts that come with Python, by character; the last twentieth is for the test."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    code = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([code[character] for character in text])
    windows = ids[: (len(ids) - 1) // CONTEXT * CONTEXT + 1]
    inputs, targets = windows[:-1].view(-1, CONTEXT), windows[1:].view(-1, CONTEXT)
    split = len(inputs) * 19 // 20
    epochs = (1, 1) if quick else (3, 2)

    def make_model() -> nn.Module:
        return ProseModel(len(alphabet))

    return Task("prose", make_model, (inputs[:split], targets[:split]), (inputs[split:], targets[split:]), 64, *epochs, 2e-3)
