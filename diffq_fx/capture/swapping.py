"""Hand a module other tensors in place of its weights for the length of one call.

For modules that are called whole (LSTM, MultiheadAttention, anything that cannot be traced): the tensors stand where the
parameters stood, so the module's own code reads them, and the parameters come back whatever happens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

_ABSENT = object()


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter ``name`` directly, and the parameter's own name there."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


@contextmanager
def swapped_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``module`` see ``weights`` (by name relative to it) in place of its parameters."""
    saved: list[tuple[nn.Module, str, object]] = []
    flat: list[tuple[nn.RNNBase, list[Tensor | None]]] = []
    try:
        for name, tensor in weights.items():
            owner, attribute = owner_of(module, name)
            saved.append((owner, attribute, owner._parameters.get(attribute, _ABSENT)))
            owner._parameters[attribute] = tensor  # type: ignore[assignment]
            if isinstance(owner, nn.RNNBase) and all(owner is not rnn for rnn, _ in flat):
                flat.append((owner, owner._flat_weights))
        for rnn, _ in flat:  # an RNN reads its weights from a list of its own
            rnn._flat_weights = [getattr(rnn, name, None) for name in rnn._flat_weights_names]
        yield
    finally:
        for owner, attribute, parameter in reversed(saved):
            if parameter is _ABSENT:
                del owner._parameters[attribute]
            else:
                owner._parameters[attribute] = parameter  # type: ignore[assignment]
        for rnn, flat_weights in flat:
            rnn._flat_weights = flat_weights
