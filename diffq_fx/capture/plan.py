"""Which parameters of a model are weights to quantize, and why the others are not."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from diffq_fx.capture.swapping import owner_of
from diffq_fx.errors import PreparationError
from diffq_fx.methods.base import Method
from diffq_fx.weights import SkippedWeight, WeightSpec

_KNOWN_OWNERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@dataclass
class WeightPlan:
    """The weights of one model: what is quantized (by the parameter's identity) and what is not."""

    specs: dict[int, WeightSpec] = field(default_factory=dict)
    skipped: list[SkippedWeight] = field(default_factory=list)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)

    def spec_of(self, tensor: object) -> WeightSpec | None:
        """The spec of a parameter that is to be quantized."""
        return self.specs.get(id(tensor))

    def names(self) -> list[str]:
        """Every name of every weight to quantize."""
        return [name for spec in self.specs.values() for name in spec.names]


def plan_weights(model: nn.Module, method: Method, caller: str) -> WeightPlan:
    """Decide for every parameter of the model whether it is a weight to quantize.

    Args:
        model: the float model.
        method: its ``exclude``, ``min_size`` and layout decide.
        caller: the public function's name, for messages.

    Returns:
        The plan, weights in the order of ``model.named_parameters()``.

    Raises:
        PreparationError: nothing can be quantized, a weight is not finite or has no data yet.
        ValueError: an exclude pattern matches no parameter.
    """
    names: dict[int, list[str]] = {}
    plan = WeightPlan()
    everything = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in everything:
        if isinstance(parameter, UninitializedTensorMixin):
            raise PreparationError(f"{caller}: weight {name!r} is not initialized yet: run the model once before preparing it.")
        names.setdefault(id(parameter), []).append(name)
        plan.parameters[id(parameter)] = parameter
    _check_patterns(method.exclude, [name for name, _ in everything], caller)
    group_size, range_size, grid = method.layout
    for key, parameter in plan.parameters.items():
        name, *aliases = names[key]
        reason = _reason_to_skip(model, name, (name, *aliases), parameter, method)
        if reason:
            plan.skipped.append(SkippedWeight(name, tuple(parameter.shape), reason))
            continue
        _check_values(name, parameter, caller)
        plan.specs[key] = WeightSpec(
            name=name,
            aliases=tuple(aliases),
            shape=tuple(parameter.shape),
            axis=_axis(owner_of(model, name)[0]),
            dtype=parameter.dtype,
            group_size=group_size,
            range_size=range_size,
            grid=grid,
        )
    if not plan.specs:
        seen = "; ".join(f"{s.name} {s.shape}: {s.reason}" for s in plan.skipped[:8]) or "it has no parameters"
        raise PreparationError(f"{caller}: the {type(model).__name__} has no weight to quantize ({seen}).")
    return plan


def _check_patterns(patterns: tuple[str, ...], names: list[str], caller: str) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            known = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(f"{caller}: exclude pattern {pattern!r} matches no parameter. The model has {known}.")


def _matches(name: str, pattern: str) -> bool:
    """A pattern names a parameter, or a module with everything below it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _reason_to_skip(model: nn.Module, name: str, names: tuple[str, ...], parameter: Tensor, method: Method) -> str:
    """Why this parameter stays in float; empty if it does not."""
    if not parameter.is_floating_point():
        return f"{parameter.dtype}: not a float type"
    for pattern in method.exclude:
        if any(_matches(each, pattern) for each in names):
            return f"excluded by {pattern!r}"
    owner, _ = owner_of(model, name)
    if parameter.ndim < 2:
        return "1-d: a bias or a norm's scale"
    if not isinstance(owner, _KNOWN_OWNERS) and parameter.numel() == max(parameter.shape):
        return f"one vector, shaped {tuple(parameter.shape)}"
    if parameter.numel() < max(method.min_size, 1):
        return f"{parameter.numel()} weights, fewer than min_size={method.min_size}"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        if owner.max_norm is not None:
            return "max_norm makes the forward rewrite the weight itself"
        if owner.sparse:
            return "sparse=True: its gradient is a sparse tensor"
    return ""


def _axis(owner: nn.Module) -> int:
    """Output channel axis of a weight, as far as its owner tells."""
    return 1 if isinstance(owner, nn.modules.conv._ConvTransposeNd) else 0


def _check_values(name: str, parameter: Tensor, caller: str) -> None:
    if parameter.is_meta:
        raise PreparationError(f"{caller}: weight {name!r} is on the meta device and has no values. Load the weights first.")
    low, high = torch.aminmax(parameter.detach())
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    bad = ~torch.isfinite(parameter.detach())
    first = [int(i) for i in bad.nonzero()[0]]
    value = parameter.detach()[tuple(first)].item()
    raise PreparationError(
        f"{caller}: weight {name!r} of shape {tuple(parameter.shape)} has {int(bad.sum())} non-finite values\n"
        f"  first at {first}: {value}; a range needs finite weights.\n"
        f"  Repair the checkpoint, or leave this weight in float with exclude=({name!r},)."
    )
