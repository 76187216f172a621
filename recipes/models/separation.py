"""The net of the source separation experiments."""

import torch.nn.functional as F
from torch import Tensor, nn


class Demucs(nn.Module):
    """Demucs (Défossez et al., arXiv:1911.13254): strided convolutions, a bidirectional LSTM, transposed convolutions, with skips.

    Differs from the paper: the mixture is scaled to unit deviation and not resampled, and convolutions are padded, so that what comes out
    is as long as what goes in, a multiple of ``4^depth``.

    Args:
        sources: instruments to separate.
        channels: of the audio, 1 or 2.
        width: channels after the first convolution; each layer has twice those of the one before.
        depth: layers on either side.
    """

    def __init__(self, sources: int = 4, channels: int = 2, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.sources, self.channels = sources, channels
        widths = [channels, *(width * 2**i for i in range(depth))]
        outputs = [sources * channels, *widths[1:-1]]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, 8, 4, 2), nn.ReLU(), nn.Conv1d(b, 2 * b, 1), nn.GLU(1))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.lstm = nn.LSTM(widths[-1], widths[-1], 2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * widths[-1], widths[-1])
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv1d(b, 2 * b, 3, 1, 1), nn.GLU(1), nn.ConvTranspose1d(b, a, 8, 4, 2))
            for a, b in reversed(list(zip(outputs, widths[1:], strict=True)))
        )

    def forward(self, mixture: Tensor) -> Tensor:
        """Mixtures, shape (N, channels, samples), to sources, shape (N, sources, channels, samples)."""
        scale = mixture.square().mean((1, 2), keepdim=True).sqrt() + 1e-5
        x, skips = mixture / scale, []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        x = self.linear(self.lstm(x.transpose(1, 2))[0]).transpose(1, 2)
        for i, layer in enumerate(self.up):
            x = x + skips[-1 - i]
            x = layer(F.relu(x) if i else x)
        return (x * scale).unflatten(1, (self.sources, self.channels))
