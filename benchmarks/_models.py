"""The models that benchmarks share beside those of recipes: usual architectures, random weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models.cifar import ResNet18


def resnet18_for_224() -> nn.Module:
    """ResNet-18 with the stem and the classes of ImageNet."""
    model = ResNet18(1000)
    model.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return model


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, *, activation: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if activation else [])]


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = _conv(inputs, hidden, 1) if expansion > 1 else []
        self.layers = nn.Sequential(*expand, *_conv(hidden, hidden, 3, stride, hidden), *_conv(hidden, outputs, 1, activation=False))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNet-v2 for images of 224x224 (3.5 M weights)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = _conv(3, 32, 3, 2)
        inputs = 32
        for expansion, outputs, repeats, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for repeat in range(repeats):
                layers.append(_InvertedResidual(inputs, outputs, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.features = nn.Sequential(*layers, *_conv(320, 1280, 1))
        self.head = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Separator(nn.Module):
    """A source separator of Demucs's kind: strided convolutions, an LSTM, transposed convolutions with skips (7.5 M weights)."""

    def __init__(self, sources: int = 4, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        widths = [1, *(width * 2**i for i in range(depth))]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, 8, 4, 2), nn.ReLU(), nn.Conv1d(b, 2 * b, 1), nn.GLU(1))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.lstm = nn.LSTM(widths[-1], widths[-1], 2, batch_first=True)
        outputs = [sources, *widths[1:-1]]
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv1d(b, 2 * b, 3, 1, 1), nn.GLU(1), nn.ConvTranspose1d(b, a, 8, 4, 2))
            for a, b in reversed(list(zip(outputs, widths[1:], strict=True)))
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        x = self.lstm(x.transpose(1, 2))[0].transpose(1, 2)
        for i, layer in enumerate(self.up):
            x = layer(F.relu(x + skips[-1 - i]))
        return x


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


class _CachedLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, width = x.shape
        q, k, v = (part.view(n, t, self.heads, width // self.heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        y = F.scaled_dot_product_attention(q, keys, values)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")), k, v


class Decoder(nn.Module):
    """One step of a language model of GPT-2's kind: one token and the cache of those before it. 6 layers, 768 wide: 81 M weights."""

    def __init__(self, vocabulary: int = 50257, width: int = 768, heads: int = 12, layers: int = 6, context: int = 1024) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.layers = nn.ModuleList(_CachedLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, 0, 0.02)
        nn.init.normal_(self.position.weight, 0, 0.02)

    def forward(self, ids: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embedding(ids) + self.position(position)
        new = []
        for i, layer in enumerate(self.layers):
            x, key, value = layer(x, keys[i], values[i])
            new.append((key, value))
        logits = F.linear(self.norm(x), self.embedding.weight)  # GPT-2 ties its head to the embedding
        return logits, torch.stack([key for key, _ in new]), torch.stack([value for _, value in new])
