"""Somebody else's code trains a model, and the model is as it was before where that diverges."""

from collections.abc import Callable

from torch import nn

from diffq_fx.errors import DivergenceError
from diffq_fx.weights import first_not_finite


def train_or_go_back(model: nn.Module, train: Callable[[], None], who: str, advice: str) -> None:
    """Train, and go back to the state before if a parameter is not finite then; the state is kept on the CPU.

    Args:
        model: what is trained.
        train: trains it.
        who: the step, for the message.
        advice: what to do about it.

    Raises:
        DivergenceError: names the first such parameter.
    """
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    train()
    if found := first_not_finite((repr(name), parameter) for name, parameter in model.named_parameters()):
        model.load_state_dict(state)
        raise DivergenceError(f"{who} diverged: {found}. The model is back in its state before that step.\n  {advice}")
