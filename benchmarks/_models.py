"""The models that benchmarks share: usual architectures, random weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images (11.2 M weights)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nn.Sequential(*(_BasicBlock(a, b, 2 if b != a else 1) for a, b in zip(widths[:-1], widths[1:], strict=True)))
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(n, t, self.heads, width // self.heads).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A transformer over token ids: a language model when causal, else an encoder that returns its features."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, causal: bool, context: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(_Layer(width, heads, 4 * width, causal) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False) if causal else nn.Identity()
        self.register_buffer("index", torch.arange(context), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position(self.index[: ids.shape[1]])
        return self.head(self.norm(self.layers(x)))


def language_model() -> Transformer:
    """6 layers, 512 wide, 4,000 tokens: 23 M weights."""
    return Transformer(4000, 512, 8, 6, causal=True)


def minilm_size() -> Transformer:
    """6 layers, 384 wide, 30,522 tokens, as MiniLM-L6: 22.6 M weights."""
    return Transformer(30522, 384, 12, 6, causal=False)
