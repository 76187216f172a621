"""How far the training of a prepared model is: the part of its state_dict that belongs to no single weight."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SURELY = 0.99
"""An average of ``bits_frozen`` from which on the averaged widths and ranges are those of the end, but for this little."""


class Known(NamedTuple):
    """The buffers as Python values."""

    steps: int = 0
    frozen: bool = False
    frozen_at: int = 0
    bits_saved: int = 0
    rest_bits: int = 0


class TrainingState(nn.Module):
    """Buffers, so that a loaded or copied model trains on as it would have; all are numbers whose average over a training does no harm.

    Buffers:
        steps: float32, 0-d: optimizer steps that the bits have made.
        bits_frozen: float32, 0-d: 1 once the widths are final and training rounds truly, else 0.
        frozen_at: float32, 0-d: the steps when they became final.
        uniform_bits: float32, 0-d: 1 where the final widths are the same for all groups, since the learned ones were worse, else 0.
        range_scale: float32, 0-d: what all ranges are multiplied with where the entropy-coded size is to hold: once the widths are
            final weights train on, and the length of their code changes.
        coding: float32, shape (2,): bits that entropy coding saves and bits of what is not quantized, in a file, as last measured.
    """

    steps: Tensor
    bits_frozen: Tensor
    frozen_at: Tensor
    uniform_bits: Tensor
    range_scale: Tensor
    coding: Tensor

    def __init__(self, device: torch.device | None) -> None:
        super().__init__()
        starts = {"steps": 0.0, "bits_frozen": 0.0, "frozen_at": 0.0, "uniform_bits": 0.0, "range_scale": 1.0, "coding": (0.0, 0.0)}
        for name, value in starts.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32, device=device))
        self._known, self._known_from = Known(), self._versions()
        self.trained_since = False  # whether weights were read for training since an optimizer's latest step, of whatever it holds
        self._awaited = ""  # the weight whose gradient tells: one a forward is enough
        self.foreign_steps = 0  # steps in a row, with training between them, of optimizers that hold no parameter of the model
        self.steps_without_bits = 0  # the same, of optimizers that hold none of the bits
        self._stepped: set[int] = set()  # the first weights of the optimizers that have stepped since the latest step that counts

    @abstractmethod
    def follow(self, reader: nn.Module) -> None:
        """Bring the widths of all weights up to date with their logits, before ``reader`` rounds its weight."""

    def was_read(self, name: str, weight: Tensor) -> None:
        """Take note of a weight that is read in training: where it asks for a gradient, once that comes (a critic may train on outputs)."""
        if not weight.requires_grad:
            self.trained_since = True  # beside adapters, which may be all that trains
        elif self._awaited in ("", name):  # read again, it is of another forward: the one before may have no backward
            self._awaited = name
            weight.register_hook(self._gradient_came)

    def _gradient_came(self, _: Tensor) -> None:
        self.trained_since = True

    def next_step(self) -> bool:
        """Whether the model has trained since the latest step; from now on the next one is asked for."""
        trained, self.trained_since, self._awaited = self.trained_since, False, ""
        return trained

    def begins_round(self, first: int) -> bool:
        """Whether a step of an optimizer, whose first weight this is, counts: of several that step in turn one does, whichever they are."""
        begins = not self._stepped or first in self._stepped
        self._stepped = {first} if begins else {*self._stepped, first}
        return begins

    @property
    def known(self) -> Known:
        """The values: read on a CPU, on another device kept, so that no step waits for it, until torch counts a write."""
        device = self.steps.device.type
        if device == "cpu" or (device != "meta" and self._known_from != self._versions()):
            self.look()
        return self._known

    def look(self) -> None:
        """Read the values from the buffers."""
        if self.steps.device.type != "meta":
            saved, rest = self.coding.tolist()
            steps, frozen, frozen_at = self.steps.item(), self.bits_frozen.item(), self.frozen_at.item()
            self._known = Known(round(steps), frozen > SURELY, round(frozen_at), round(saved), round(rest))
            self._known_from = self._versions()

    def note(self, **changes: int) -> None:
        """Change some of the values."""
        old = self.known
        new = old._replace(**changes)
        for buffer, before, after in zip((self.steps, self.bits_frozen, self.frozen_at, *self.coding), old, new, strict=True):
            if before != after:
                buffer.fill_(after)
        self._known, self._known_from = new, self._versions()  # what was written is known: to read it would wait for the device

    def _versions(self) -> tuple[int, ...]:
        buffers = (self.steps, self.bits_frozen, self.coding)
        return tuple(0 if buffer.is_inference() else buffer._version for buffer in buffers)

    @property
    def frozen(self) -> bool:
        """Whether the widths are final: training rounds truly and the bits do not move."""
        return self._known.frozen if torch.compiler.is_compiling() else self.known.frozen

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.look()  # now, since a compiled forward could not
