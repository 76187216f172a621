"""What a method is: a frozen config that picks weights and puts a quantizer on each of them.

A new method is one file: a subclass of :class:`Method` (its settings) and one of :class:`WeightQuantizer` (what happens
to a weight in training, how it is rounded, how it is stored). No pass and no exporter to ONNX knows a method's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.arguments import check_flags, check_whole
from diffq_fx.errors import DiffQError, PreparationError
from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupSize
from diffq_fx.functional.precision import keeping_dtype
from diffq_fx.kernels.checksum import checksum
from diffq_fx.methods.recompute import active
from diffq_fx.sharded import is_sharded, refuse_flat, whole
from diffq_fx.storage import StoredWeight
from diffq_fx.storage.footprint import Footprint
from diffq_fx.weights import WeightSpec, refuse_not_finite

Place = tuple[dict[str, Any], str]
"""Where a module keeps a parameter or a buffer, and its name there. Not the tensor: moving a model makes new buffers, and
load_state_dict(assign=True) new parameters. Not the module: in a pickle it would come before what it is made of."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The settings that every method has: which weights it leaves alone, and how the rest is kept."""

    exclude: tuple[str, ...] = ()
    """Patterns (as in a shell: ``*``, ``?``, ``[ab]``) of state_dict names that stay in float. Each must match something."""
    min_size: int = 0
    """Weights with fewer elements stay in float."""
    rest_dtype: Literal["float32", "float16"] = "float32"
    """What is not quantized is counted and exported in this type."""

    whole_model: ClassVar[tuple[str, ...]] = ()
    """Settings that all configs of the class in one mapping must agree on; the others may differ from weight to weight."""

    @property
    @abstractmethod
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """``(group_size, range_size, grid)`` for the weights of this method."""

    @property
    def scale_type(self) -> torch.dtype:
        """float16 where scales are to be values of that."""
        return torch.float32

    @abstractmethod
    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "WeightQuantizer":
        """Make the quantizer of one weight.

        Raises:
            PreparationError: the method cannot quantize this weight; says which and why.
        """

    def check_common(self) -> None:
        """Refuse what no method can work with, and what a Literal or a bool cannot be, by name and value; for ``__post_init__``."""
        name = type(self).__name__
        for setting, hint in get_type_hints(type(self)).items():
            if (choices := _choices(hint)) and (value := getattr(self, setting)) not in choices:
                raise ValueError(f"{name}: {setting} must be one of {choices}, got {value!r}.")
            if hint is bool:
                check_flags(name, **{setting: getattr(self, setting)})
        check_whole(name, "min_size", self.min_size, 0)
        if not isinstance(self.exclude, list | tuple) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise TypeError(f'{name}: exclude is a tuple of patterns such as ("*.bias",), got {self.exclude!r}.')

    def refuse_idle(self, setting: str, where: str, *, is_used: bool) -> None:
        """Refuse a setting that is not the default and has no effect beside the others; ``where`` are those with which it has one."""
        value = getattr(self, setting)
        if not is_used and value != type(self).__dataclass_fields__[setting].default:
            raise ValueError(f"{type(self).__name__}: {setting}={value!r} has no effect: it is for {where}.")


def _choices(hint: Any) -> tuple[Any, ...]:
    """What a Literal, or one that may be None, allows; nothing for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    first, *others = get_args(hint) or (None,)
    return (*get_args(first), None) if get_origin(first) is Literal and others == [type(None)] else ()


def check_group(method: str, setting: str, size: Any, names: tuple[str, ...] = ("tensor", "channel")) -> None:
    """Refuse a group size that is none.

    Example:
        >>> check_group("STE", "group_size", 0)
        Traceback (most recent call last):
        ...
        ValueError: STE: group_size must be a whole number of at least 1, got 0.
    """
    if isinstance(size, str):
        if size not in names:
            known = ", ".join(f'"{name}"' for name in names)
            raise ValueError(f"{method}: {setting} must be {known} or a number, got {size!r}.")
    else:
        check_whole(method, setting, size, 1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(weight: Tensor, rounded: Tensor) -> Tensor:
    """Give ``rounded`` forward and the identity gradient to ``weight`` backward.

    Example:
        >>> weight = torch.tensor([0.4], requires_grad=True)
        >>> straight_through(weight, weight.detach().round()).backward()
        >>> weight.grad
        tensor([1.])
    """
    return _StraightThrough.apply(weight, rounded)


SUMS = 16
"""Numbers that tell one weight from another."""
_ROUNDED = 2e-3
"""Above what rounding to bfloat16 changes of the sums of a weight, 4e-4, and below what an adapter of 1 % of the weight changes."""


def _sums(weight: Tensor) -> Tensor:
    """Sums of every sixteenth value with alternating signs, over the norm."""
    values = weight.detach().float().reshape(-1)
    signed = F.pad(values, (0, -values.numel() % (2 * SUMS))).view(-1, 2, SUMS)
    return (signed[:, 0] - signed[:, 1]).sum(0) / values.norm().clamp(min=torch.finfo(torch.float32).tiny)


def count_forward(forwards: Tensor, saved: Tensor) -> int:
    """Count a forward in training; how many were before it. For operators: torch.compile would make code for each number."""
    saved.add_(1)
    return int(forwards.add_(1)) - 1


class WeightQuantizer(nn.Module, ABC):
    """The node on one weight of a prepared model: weight in, the weight that the layer computes with out.

    In train() it gives the method's training-time weight. In eval() it gives the truly rounded weight, made once and kept
    until a value of the weight or of the quantizer's own state changes; gradients go straight through.
    """

    place: Place
    """Where the model keeps the weight."""
    learned_for: Tensor | None
    """A buffer of methods that learn ranges or steps: sums of a weight that does not train while they do, else zeros."""
    forwards: Tensor | None
    """A buffer of methods that make something anew after some forwards: how many there were in training."""

    def __init__(self, spec: WeightSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("learned_for", None)
        self.register_buffer("forwards", None)
        self._forwards = torch.zeros((), device="cpu")  # the same, since to read the buffer would wait for a device
        self._weight_trains: bool | None = None
        self._seeks_anew = False
        self._stand_in: Callable[[], Tensor] | None = None
        self._kept: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The weight, as the model has it now.

        Raises:
            PreparationError: something has put it elsewhere since.
        """
        registry, name = self.place
        weight = registry.get(name)
        if weight is None:
            raise PreparationError(
                f"weight {self.spec.name!r} is no longer where it was prepared: it was removed, parametrized or pruned since. "
                "Do that to the float model and prepare it then."
            )
        return weight

    @abstractmethod
    def training_weight(self, weight: Tensor) -> Tensor:
        """The weight that the layer trains with; differentiable in the weight and the method's parameters."""

    @property
    def can_make_again(self) -> bool:
        """Whether ``training_weight`` changes nothing and gives the same again for the same random state.

        :class:`~diffq_fx.recompute_weights` makes the weights of no other method again.
        """
        return False

    @abstractmethod
    def rounded_weight(self, weight: Tensor) -> Tensor:
        """What the converted model will compute with: exactly ``store(weight)()``, in operations a compiler can trace."""

    @abstractmethod
    def store(self, weight: Tensor) -> StoredWeight:
        """Round the weight for good."""

    @abstractmethod
    def footprint(self) -> Footprint:
        """The parts of the weight's sizes once it is rounded; the same as that of what :meth:`store` gives."""

    def note_learned_for(self, weight: Tensor, *, anew: bool = False) -> None:
        """Remember a weight that does not train itself, for which a range or a step is learned: an adapter may be merged into it."""
        trains = weight.requires_grad
        if self.learned_for is None or (trains == self._weight_trains and not anew):
            return
        if anew or trains or self._weight_trains or not bool(self.learned_for.any()):  # else a state that was loaded knows it
            self.learned_for.copy_(torch.zeros_like(self.learned_for) if trains else _sums(whole(weight)))
        self._weight_trains = trains

    def is_learned_for_another(self) -> bool:
        """Whether the weight has other values than that for which a range or a step was learned, which then no longer fits."""
        if self._seeks_anew:
            return True
        if self.learned_for is None or self._weight_trains or self.weight.requires_grad or torch.compiler.is_compiling():
            return False  # without a look at values, for which a GPU makes a forward wait
        if not bool(self.learned_for.any()):
            return False
        return bool((_sums(whole(self.weight)) - self.learned_for).abs().max() > _ROUNDED)

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """What :func:`count_forward` takes."""
        return self._forwards, self.get_buffer("forwards")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.forwards is not None and not self.forwards.is_meta:
            self._forwards.fill_(round(self.forwards.item()))

    def rounded_anew(self, weight: Tensor) -> Tensor:
        """The weight as :meth:`rounded_weight` would make it with no range or step learned."""
        self._seeks_anew = True
        try:
            return self.rounded_weight(weight)
        finally:
            self._seeks_anew = False

    def trained_values(self) -> list[tuple[str, Tensor]]:
        """What training moves, each with the words for it in a message: the weight, and the quantizer's own parameters."""
        name = f"weight {self.spec.name!r}"
        return [(name, self.weight), *((f"{own} of {name}", each) for own, each in self.named_parameters(recurse=False))]

    def refuse_not_finite(self, weight: Tensor) -> None:
        """Refuse to round a weight where it, a parameter or what its rounding is made of, such as a range, is not finite.

        Raises:
            DivergenceError: names the weight, the tensor and the first such place.
        """
        name, needed = f"weight {self.spec.name!r}", {id(tensor) for tensor in (*self.parameters(), *self.state_tensors())}
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        refuse_not_finite([(name, weight), *((f"{what} of {name}", tensor) for what, tensor in own if id(tensor) in needed)])

    def follow(self) -> None:
        """Bring what the rounding is made of up to date with the values that it follows from, before a forward in eval()."""

    def state_tensors(self) -> tuple[Tensor, ...]:
        """The tensors beside the weight that ``rounded_weight`` is made of."""
        return (*self.parameters(recurse=False), *self.buffers(recurse=False))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to compute with, of the weight's shape and dtype."""
        if self._stand_in is not None:
            return self._stand_in()
        if not torch.compiler.is_compiling() and _compat.in_function_transform(unknown=False):
            raise DiffQError(
                f"weight {self.spec.name!r}: torch.func's transforms (vmap, grad, jvp, jacrev, ...) do not go through a prepared model. "
                "Use torch.autograd, or transform the float model or the converted one."
            )
        if is_sharded(weight):
            raise DiffQError(
                f"weight {self.spec.name!r} is a DTensor where its quantizer reads it, of which this rank holds a part alone.\n"
                "  Tensor parallelism is not supported; fully_shard (FSDP2) is, on prepared layers or on the whole prepared model."
            )
        if getattr(self, "_is_fsdp_managed_module", False) and not isinstance(weight, nn.Parameter):
            refuse_flat(self.spec.name)
        if weight.shape != self.spec.shape:
            raise PreparationError(
                f"weight {self.spec.name!r} was prepared with shape {tuple(self.spec.shape)} and has {tuple(weight.shape)} now.\n"
                "  Resize layers before they are prepared, or prepare the float model anew."
            )
        if self.training:
            recompute = None if torch.compiler.is_compiling() else active()
            if recompute is None or not self.can_make_again:
                return self.training_weight(weight)
            return recompute.keep_recipe(
                self.spec.name, partial(self.training_weight, weight), (weight, *self.parameters(), *self.buffers())
            )
        rounded = self._rounded_weight(weight)
        return straight_through(weight, rounded) if torch.is_grad_enabled() and weight.requires_grad else rounded

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a compiled graph fuses the rounding and has no use for the check
            return self.rounded_weight(weight.detach())
        self.follow()
        state = checksum((weight, *self.state_tensors()))
        key, kept = (state, weight.shape, weight.dtype), self._kept
        if state is None or kept is None or kept[0] != key or (kept[1].is_inference() and torch.is_grad_enabled()):
            if weight.device.type == "cpu":  # elsewhere the look would make every forward wait
                self.refuse_not_finite(weight)
            with torch.no_grad():
                kept = key, self.rounded_weight(weight.detach())
            self._kept = None if state is None else kept
        return kept[1]

    def train(self, mode: bool = True) -> "WeightQuantizer":
        """Change the mode, and drop the rounded weight that eval() keeps."""
        self._kept = None
        return super().train(mode)

    def pass_through(self, stand_in: Callable[[], Tensor] | None) -> None:
        """Give out ``stand_in()`` whatever comes in, until called again with None (the capture gate uses it)."""
        self._stand_in = stand_in

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WeightQuantizer":
        """Follow the model to another device, but stay in float32: half precision cannot hold a small step of the bits."""
        super()._apply(keeping_dtype(fn), recurse)
        self._kept = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The module without the weight that eval() keeps: a copy or a pickle makes its own."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Name and shape for ``print(model)``."""
        return f"{self.spec.name!r}, shape={self.spec.shape}"
