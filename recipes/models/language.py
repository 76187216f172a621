"""The transformer of the WikiText-103 experiments: adaptive input and adaptive softmax, tied (Baevski and Auli, arXiv:1809.10853).

Shape legend: N rows, T tokens, W width, V words. Words are numbered by frequency; a band is a range of them with embeddings of one width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Band(nn.Module):
    """The words from one number to the next: embeddings narrower than the model, and their projection to its width."""

    def __init__(self, words: int, narrow: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(words, narrow) * narrow**-0.5)
        self.projection = nn.Linear(narrow, width, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Shape (N, T, W)."""
        return self.projection(F.embedding(ids, self.weight))

    def scores(self, x: Tensor) -> Tensor:
        """By the same weights: shape (N, T, words)."""
        return F.linear(F.linear(x, self.projection.weight.t()), self.weight)


class _Layer(nn.Module):
    """Attention and feed-forward, each behind a norm; ``gate`` is 0 where the layer is dropped."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, width)
        x = x + gate * self.dropout(self.out(y))
        return x + gate * self.dropout(self.down(F.relu(self.up(self.norm2(x)))))


class AdaptiveTransformer(nn.Module):
    """Word ids to the log-probabilities of the next word, shape (N, T, V).

    All V are computed, about 1 MB a token for WikiText-103: so the model exports as it is, and a batch may be small.

    Args:
        words: V.
        cutoffs: where the second and later bands begin.
        width: of the first band and the model; every later band is a quarter as wide as the one before.
        heads: of attention.
        hidden: width of the feed-forward layers.
        layers: their number.
        dropout: of the residual branches.
        layer_drop: probability that a layer is left out in a training step (the others count for more).
        context: T at most.
    """

    def __init__(
        self,
        words: int,
        cutoffs: Sequence[int] = (20_000, 60_000),
        width: int = 1024,
        heads: int = 8,
        hidden: int = 4096,
        layers: int = 16,
        dropout: float = 0.1,
        layer_drop: float = 0.1,
        context: int = 512,
    ) -> None:
        super().__init__()
        self.edges = [0, *(cut for cut in cutoffs if cut < words), words]
        bands = zip(self.edges[:-1], self.edges[1:], strict=True)
        self.bands = nn.ModuleList(_Band(end - begin, max(width // 4**i, 1), width) for i, (begin, end) in enumerate(bands))
        if len(self.bands) > 1:
            self.classes = nn.Linear(width, len(self.bands) - 1, bias=False)
        self.layers = nn.ModuleList(_Layer(width, heads, hidden, dropout) for _ in range(layers))
        self.dropout, self.layer_drop, self.norm = nn.Dropout(dropout), nn.Dropout(layer_drop), nn.LayerNorm(width)
        angles = torch.arange(context)[:, None] * torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2 - 1)))
        self.register_buffer("position", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)
        for name, each in self.named_parameters():
            if each.ndim == 2 and not name.startswith("bands"):
                nn.init.xavier_uniform_(each)

    def forward(self, ids: Tensor) -> Tensor:
        """Log-probabilities."""
        embedded = torch.zeros(())
        for band, begin, end in zip(self.bands, self.edges[:-1], self.edges[1:], strict=True):
            inside = ((ids >= begin) & (ids < end)).unsqueeze(-1)
            embedded = embedded + inside * band.embed((ids - begin).clamp(0, end - begin - 1))
        x = self.dropout(embedded * self.norm.weight.shape[0] ** 0.5 + self.position[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, self.layer_drop(torch.ones_like(x[:1, :1, :1])))
        x = self.norm(x)
        classes = [self.classes(x)] if len(self.bands) > 1 else []
        head = torch.cat([self.bands[0].scores(x), *classes], -1).float().log_softmax(-1)
        parts = [head[..., : self.edges[1]]]
        for i, band in enumerate(list(self.bands)[1:]):
            parts.append(band.scores(x).float().log_softmax(-1) + head[..., self.edges[1] + i].unsqueeze(-1))
        return torch.cat(parts, -1)
