"""How far the training of a prepared model is: the part of its state_dict that belongs to no single weight."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Known(NamedTuple):
    """The buffers as Python values."""

    steps: int
    frozen: bool
    bits_saved: int
    rest_bits: int


class TrainingState(nn.Module):
    """Buffers, so that a loaded or copied model trains on as it would have; known as Python values too, so that no step waits for a device.

    Buffers:
        steps: int64, 0-d: optimizer steps that the bits have made.
        bits_frozen: bool, 0-d: whether the widths are final and training rounds truly.
        stretch: float32, 0-d: what all ranges are multiplied with where the entropy-coded size is to hold: once the widths are final
            weights train on, and the length of their code changes.
        coding: int64, shape (2,): bits that entropy coding saves and bits of what is not quantized, in a file, as last measured.
    """

    steps: Tensor
    bits_frozen: Tensor
    stretch: Tensor
    coding: Tensor

    def __init__(self, device: torch.device | None) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("bits_frozen", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("stretch", torch.ones((), device=device))
        self.register_buffer("coding", torch.zeros(2, dtype=torch.int64, device=device))
        self._known: Known | None = None
        self._known_from: tuple[int, ...] = ()

    @property
    def known(self) -> Known:
        """The values, without a device sync but for the first time."""
        if self._known is None:
            saved, rest = self.coding.tolist()
            self._known, self._known_from = Known(int(self.steps), bool(self.bits_frozen), saved, rest), self._versions()
        return self._known

    def note(self, **changes: int) -> None:
        """Change some of the values."""
        old, new = self.known, self.known._replace(**changes)
        for buffer, before, after in zip((self.steps, self.bits_frozen, *self.coding), old, new, strict=True):
            if before != after:
                buffer.fill_(after)
        self._known, self._known_from = new, self._versions()

    def read_again(self) -> None:
        """Follow the buffers where another has written to them, as the moving average of a model's state does."""
        if self.steps.device.type != "meta" and self._known is not None and self._known_from != self._versions():
            self._known = None
            self._known = self.known

    def _versions(self) -> tuple[int, ...]:
        return self.steps._version, self.bits_frozen._version, self.coding._version

    @property
    def progress(self) -> tuple[int, bool]:
        """Steps so far, and whether the bits are final."""
        return self.known[:2]

    @property
    def frozen(self) -> bool:
        """Whether the widths are final: training rounds truly and the bits do not move."""
        return self.known.frozen

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, default in (("stretch", torch.ones(())), ("coding", self.coding)):  # a state from before they were kept
            state_dict.setdefault(f"{prefix}{name}", default)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._known = None
        if self.steps.device.type != "meta":
            self._known = self.known  # now, since a compiled forward could not
