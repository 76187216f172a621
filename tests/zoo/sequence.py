"""Recurrent networks, attention and transformers of torch itself, and the modules that read weights in unusual ways."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo.entry import Entry, randn, tokens


class LSTMLanguageModel(nn.Module):
    """Embedding, two LSTM layers, decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(31, 12), nn.LSTM(12, 16, 2, batch_first=True, dropout=0.3)
        self.decoder = nn.Linear(16, 31)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(ids))
        return self.decoder(out)


class WeightNormedLSTM(nn.Module):
    """A weight of an LSTM is itself the result of a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = weight_norm(nn.LSTM(6, 8), "weight_hh_l0"), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class BidirectionalGRU(nn.Module):
    """A GRU in both directions with an optional first state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(6, 8, bidirectional=True), nn.Linear(16, 4)

    def forward(self, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if h0 is None:
            h0 = x.new_zeros(2, x.shape[1], 8)
        out, state = self.gru(x, h0)
        return self.head(out), state


class Attention(nn.Module):
    """Self attention by nn.MultiheadAttention, which reads the weight of its child out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x, need_weights=False)
        return self.head(out)


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with keys and values of other sizes: four projections, and the attention weights as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        out, weights = self.attention(query, key, value)
        return {"out": out, "weights": weights}


class Encoder(nn.Module):
    """nn.TransformerEncoder, whose layers read their children's weights in the fast path of eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Seq2Seq(nn.Module):
    """nn.Transformer: encoder, decoder, cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(16, 4, 1, 1, 32, dropout=0.1, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.transformer(source, target)


class Cells(nn.Module):
    """The three RNN cells, called in a Python loop over the time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.gru, self.lstm = nn.RNNCell(5, 6), nn.GRUCell(6, 7), nn.LSTMCell(7, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(1)
        a, b = x.new_zeros(batch, 6), x.new_zeros(batch, 7)
        c = (x.new_zeros(batch, 8), x.new_zeros(batch, 8))
        for t in range(4):
            a = self.rnn(x[t], a)
            b = self.gru(a, b)
            c = self.lstm(b, c)
        return self.head(c[0])


class Demucs(nn.Module):
    """A small Demucs: strided convolutions, LSTM, transposed convolutions, and a padding computed by math.ceil."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 4, 6, 8)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.encoder = nn.ModuleList(nn.Sequential(nn.Conv1d(i, o, 8, 4), nn.ReLU(), nn.Conv1d(o, 2 * o, 1), nn.GLU(1)) for i, o in pairs)
        self.lstm, self.linear = nn.LSTM(8, 8, bidirectional=True), nn.Linear(16, 8)
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.Conv1d(o, 2 * o, 3, padding=1), nn.GLU(1), nn.ConvTranspose1d(o, i, 8, 4)) for i, o in reversed(pairs)
        )

    def valid_length(self, length: int) -> int:
        for _ in self.encoder:
            length = max(math.ceil((length - 8) / 4) + 1, 1)
        for _ in self.encoder:
            length = (length - 1) * 4 + 8
        return int(length)

    def forward(self, mix: Tensor) -> Tensor:
        x = F.pad(mix, (0, self.valid_length(mix.shape[-1]) - mix.shape[-1]))
        skips = []
        for layer in self.encoder:
            x = layer(x)
            skips.append(x)
        x = self.linear(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)
        for layer in self.decoder:
            x = layer(x + skips.pop(-1)[..., : x.shape[-1]])
        return x[..., : mix.shape[-1]]


class Tied(nn.Module):
    """Embedding and head share a weight, and one Linear is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(29, 16), nn.Linear(16, 16), nn.Linear(16, 29, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.body(self.embedding(ids)))))


class CausalAttention(nn.Module):
    """Attention as nanoGPT writes it: one projection for all three, and a mask cut out of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out, self.dropout = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.1)
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        query, key, value = self.project(x).split(8, dim=2)
        query, key = (part.view(batch, length, 2, width // 2).transpose(1, 2) for part in (query, key))
        value = value.view(batch, length, 2, width // 2).transpose(1, 2)
        scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(4))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        out = self.dropout(F.softmax(scores, dim=-1)) @ value
        return self.out(out.transpose(1, 2).contiguous().view(batch, length, width))


class TiedToAttention(nn.Module):
    """A Linear shares the weight that nn.MultiheadAttention reads of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
        self.head.weight = self.attention.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.head(x), x, x)[0])


class ReadsItsChild(nn.Module):
    """The parent computes with the weight of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.relu(F.linear(x, self.child.weight, self.child.bias))) @ self.child.weight.t()


class Bag(nn.Module):
    """EmbeddingBag with offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(23, 8, mode="mean"), nn.Linear(8, 3)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(ids, offsets))


class BareParameters(nn.Module):
    """Weights that no layer owns: einsum, matmul on either side, a ParameterList, a ParameterDict, and a learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.right = nn.Parameter(torch.randn(8, 2, 4)), nn.Parameter(torch.randn(8, 6))
        self.left = nn.Parameter(torch.randn(5, 5))
        self.rows = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])
        self.named = nn.ParameterDict({"out": torch.randn(3, 6)})
        self.scale = nn.Parameter(torch.ones(6))
        self.position = nn.Parameter(torch.randn(1, 5, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.left @ x + self.position
        heads = torch.einsum("btc,chd->bthd", x, self.query)
        out = torch.matmul(x, self.right) * self.scale
        for row in self.rows:
            out = torch.relu(out @ row)
        return F.linear(out, self.named["out"]), heads


class Bilinear(nn.Module):
    """nn.Bilinear has a weight of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(5, 4, 6)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.bilinear(a, b)


def _spoken_offsets(variant: int) -> tuple[Tensor, Tensor]:
    return tokens(23, 12 + variant), torch.tensor([0, 3, 7, 8][: 3 + variant])


def _gru_inputs(variant: int) -> tuple[Any, ...]:
    return (randn(5 + variant, 2 + variant, 6), randn(2, 2 + variant, 8))


ENTRIES = [
    Entry(name="lstm_lm", build=LSTMLanguageModel, inputs=lambda v: tokens(31, 2 + v, 7 + v), weights=6),
    Entry(
        name="weight_normed_lstm",
        build=WeightNormedLSTM,
        inputs=lambda v: randn(5 + v, 2 + v, 6),
        weights=3,
        skipped=("lstm.parametrizations.weight_hh_l0.original0",),
        pickles=False,
    ),
    Entry(name="gru_state_given", build=BidirectionalGRU, inputs=_gru_inputs, weights=5),
    Entry(
        name="gru_state_omitted",
        build=BidirectionalGRU,
        inputs=lambda v: _gru_inputs(v)[:1],
        weights=5,
        untraceable="also takes h0, which the example leaves out",
    ),
    Entry(name="mha", build=Attention, inputs=lambda v: randn(2 + v, 6 + v, 16), weights=3),
    Entry(
        name="cross_attention",
        build=CrossAttention,
        inputs=lambda v: {"query": randn(2, 5 + v, 16), "key": randn(2, 7 + v, 6), "value": randn(2, 7 + v, 10)},
        weights=4,
    ),
    Entry(name="transformer_encoder", build=Encoder, inputs=lambda v: randn(2 + v, 6 + v, 16), weights=9),
    Entry(name="transformer", build=Seq2Seq, inputs=lambda v: (randn(2 + v, 6, 16), randn(2 + v, 5 + v, 16)), weights=10),
    Entry(name="rnn_cells", build=Cells, inputs=lambda v: randn(4 + v, 2 + v, 5), weights=7),
    Entry(name="demucs", build=Demucs, inputs=lambda v: randn(2 + v, 1, 300 + 50 * v), weights=17, untraceable="inputs to control flow"),
    Entry(name="tied", build=Tied, inputs=lambda v: tokens(29, 2 + v, 5 + v), weights=2),
    Entry(name="causal_attention", build=CausalAttention, inputs=lambda v: randn(2 + v, 5 + v, 8), weights=2),
    Entry(name="tied_to_attention", build=TiedToAttention, inputs=lambda v: randn(2 + v, 5 + v, 8), weights=2),
    Entry(name="reads_its_child", build=ReadsItsChild, inputs=lambda v: randn(3 + v, 8), weights=2),
    Entry(name="embedding_bag", build=Bag, inputs=_spoken_offsets, weights=2),
    Entry(name="bare_parameters", build=BareParameters, inputs=lambda v: randn(2 + v, 5, 8), weights=6, skipped=("position",)),
    Entry(name="bilinear", build=Bilinear, inputs=lambda v: (randn(3 + v, 5), randn(3 + v, 4)), weights=1),
]
