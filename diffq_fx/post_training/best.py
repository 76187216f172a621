"""The best of the states that a model goes through, by the held-out batches."""

import math

import torch
from torch import nn

from diffq_fx.post_training.batches import Calibration
from diffq_fx.post_training.limits import Limits
from diffq_fx.post_training.reference import FloatOutputs


class Best:
    """The state whose outputs on the held-out batches are nearest to those of the float model, of those that were looked at.

    Attributes:
        distance: its mean distance.
        latest: that of the state looked at last.
        took: the part of the time that a look takes at most.
    """

    def __init__(self, model: nn.Module, wanted: FloatOutputs, data: Calibration, limits: Limits) -> None:
        self._model, self._wanted, self._data, self._limits = model, wanted, data, limits
        self._state = [*model.parameters(), *model.buffers()]
        self._values = [tensor.detach().clone() for tensor in self._state]
        self.distance = self.latest = math.inf
        self.took = 0.0

    @torch.no_grad()
    def look(self) -> bool:
        """Keep the present state if it is better than any before."""
        began = self._limits.share
        held_out = self._data.held_out
        self.latest = math.fsum(float(self._wanted.distance(self._model, example)) for example in held_out) / len(held_out)
        self.took = max(self.took, self._limits.share - began)
        if not self.latest < self.distance:
            return False
        self.distance = self.latest
        for value, tensor in zip(self._values, self._state, strict=True):
            value.copy_(tensor)
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to it."""
        for value, tensor in zip(self._values, self._state, strict=True):
            tensor.copy_(value)
