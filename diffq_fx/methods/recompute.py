"""The weights that a prepared model trains with, made again in the backward in place of being kept for it."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffq_fx.errors import DiffQError
from diffq_fx.kernels.native import is_plain

_WORTH_MAKING = 1 << 14
"""Weights below which a tensor is kept: the state of the random generator takes 5 kB."""

_entered = threading.local()  # hooks on saved tensors belong to a thread, too


@dataclass(eq=False)
class _Made:
    """How one weight was made in this forward."""

    name: str
    make: Callable[[], Tensor]
    sources: Sequence[Tensor]
    random_state: list[Tensor]
    versions: tuple[int, ...]
    result: weakref.ref[Tensor]
    result_version: int
    users: int = 0  # how many saved tensors lie in the result
    asked: int = 0
    kept: Tensor | None = None

    def is_stored_in(self, tensor: Tensor) -> bool:
        result = self.result()
        if result is None or not is_plain(tensor):  # a tensor of a subclass may have no memory of its own
            return False
        return _address(result) == _address(tensor) and result._version == self.result_version

    def again(self) -> Tensor:
        if _versions(self.sources) != self.versions:
            raise DiffQError(
                f"recompute_weights: weight {self.name!r} or its bits were changed between forward and backward, so what "
                "the forward computed with cannot be made again. Call backward() before optimizer.step() and before weights are loaded, "
                "or train without recompute_weights()."
            )
        result = self._make_again() if self.kept is None else self.kept
        self.asked += 1
        self.kept = result if self.asked % self.users else None  # the next one who needs it follows soon: a layer, then its quantizer
        return result

    def _make_again(self) -> Tensor:
        device = self.sources[0].device
        now = _random_state(device)
        _set_random_state(device, self.random_state)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                return self.make()
        finally:
            _set_random_state(device, now)


@dataclass(eq=False)
class _Saved:
    """What autograd keeps in place of a tensor: the tensor itself, or how the weight that it lay in was made."""

    source: Tensor | _Made
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class recompute_weights(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 - as torch's own save_on_cpu
    """Train within this context to keep no copy of the weights for the backward: they are made again there, with the same noise.

    A layer's backward needs the weight that its forward computed with. Of a plain model that is the weight itself; of a prepared one it is
    ``w + step * n``, DiffQ (arXiv:2104.09987), or the rounded weight: 4 bytes a weight more. Here only what they are made of
    is kept, at the cost of making them a second time. The gradients are the same to the last bit.

    Enter it for the forward; the backward may come after it. Like torch's ``save_on_cpu`` it is made of
    ``torch.autograd.graph.saved_tensors_hooks``, of which the innermost pair alone is called: such hooks around it see nothing, and
    ``torch.func`` does not go with it. Under autocast layers keep their half-precision copy as ever, and graphs of ``torch.compile``
    what the compiler chose: enter it around the compiled model, not within. Small weights are kept, and those of methods that
    hold something over from one forward to the next (``QuantNoise(range="least_error")``, ``ProductQuantization(noise="exact")``).

    Raises:
        DiffQError: in the backward, where a weight or its bits changed since the forward.
        RuntimeError: in the backward, where another tensor that it needs was changed in place, as without this.

    Example:
        >>> from diffq_fx import prepare_diffq
        >>> model = prepare_diffq(torch.nn.Linear(256, 256), torch.zeros(1, 256))
        >>> with recompute_weights():
        ...     loss = model(torch.ones(1, 256)).sum()
        >>> loss.backward()
    """

    def __init__(self) -> None:
        self._making: list[_Saved] | None = None
        self._live: list[_Made] = []
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        """Begin."""
        super().__enter__()
        _stack().append(self)

    def __exit__(self, *exception: object) -> None:
        """End; the backward still makes again what was left out."""
        _stack().pop()
        self._live.clear()
        super().__exit__(*exception)

    def keep_recipe(self, name: str, make: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        """What ``make`` makes of tensors, the weight of that name first; autograd will not keep it."""
        weight = sources[0]
        if weight.numel() < _WORTH_MAKING or not is_plain(weight) or not torch.is_grad_enabled():
            return make()
        state, self._making = _random_state(weight.device), []
        try:
            result = make()
        finally:
            inside, self._making = self._making, None
        made = _Made(name, make, sources, state, _versions(sources), weakref.ref(result), result._version)
        self._live = [each for each in self._live if each.result() is not None]
        self._live.append(made)
        for saved in inside:  # what the quantizer itself keeps of its result
            if isinstance(saved.source, Tensor) and made.is_stored_in(saved.source):
                saved.source, made.users = made, made.users + 1
        return result

    def _pack(self, tensor: Tensor) -> _Saved:
        made = next((each for each in self._live if each.is_stored_in(tensor)), None)
        if made is not None:
            made.users += 1
        saved = _Saved(made or tensor, tensor._version, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        if self._making is not None:
            self._making.append(saved)
        return saved

    def _unpack(self, saved: _Saved) -> Tensor:
        if isinstance(saved.source, _Made):
            return saved.source.again().as_strided(saved.size, saved.stride, saved.offset)
        if saved.source._version != saved.version:  # autograd leaves this check to the hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
                f"{tuple(saved.size)} is at version {saved.source._version}; expected version {saved.version} instead."
            )
        return saved.source


def active() -> recompute_weights | None:
    """The innermost context that this thread is in."""
    stack = _stack()
    return stack[-1] if stack else None


def _stack() -> list[recompute_weights]:
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    return _entered.stack


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _random_state(device: torch.device) -> list[Tensor]:
    own = [torch.get_rng_state()]
    return own if device.type == "cpu" else [*own, torch.get_device_module(device).get_rng_state(device)]


def _set_random_state(device: torch.device, state: list[Any]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)
