"""Keep the last good state of a model while somebody else's code trains it."""

import torch
from torch import nn

from diffq_fx.errors import DivergenceError


class LastGoodState:
    """A copy of a model's state, on the CPU, and the way back to it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def restore(self) -> None:
        """Put the state back."""
        self._model.load_state_dict(self._state)

    def check(self, who: str, advice: str) -> None:
        """Go back if training has left a parameter that is not finite.

        Args:
            who: the step, for the message.
            advice: what to do about it.

        Raises:
            DivergenceError: names the first such parameter.
        """
        for name, parameter in self._model.named_parameters():
            bad = int((~torch.isfinite(parameter.detach())).sum())
            if bad:
                self.restore()
                raise DivergenceError(
                    f"{who} diverged: {bad} of {parameter.numel()} values of {name!r} are not finite. "
                    f"The model is back in its state before that step.\n  {advice}"
                )
