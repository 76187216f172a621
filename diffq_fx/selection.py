"""Which parameters of a model are weights to quantize, and why the others are not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffq_fx.errors import PreparationError
from diffq_fx.methods.base import Method
from diffq_fx.methods.mapping import MethodChoice, matches
from diffq_fx.weights import SkippedWeight, WeightSpec, owner_of

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
class Selection:
    """The weights of one model: what is quantized (by the parameter's identity) and what is not."""

    specs: dict[int, WeightSpec] = field(default_factory=dict)
    skipped: list[SkippedWeight] = field(default_factory=list)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    methods: dict[int, Method] = field(default_factory=dict)
    """The method of each weight in ``specs``."""

    def spec_of(self, tensor: object) -> WeightSpec | None:
        """The spec of a parameter that is to be quantized."""
        return self.specs.get(id(tensor))

    def names(self) -> list[str]:
        """Every name of every weight to quantize."""
        return [name for spec in self.specs.values() for name in spec.names]


def select_weights(model: nn.Module, choice: MethodChoice, caller: str) -> Selection:
    """Decide for every parameter of the model whether it is a weight to quantize, and by which method.

    Returns:
        The plan, weights in the order of ``model.named_parameters()``.

    Raises:
        PreparationError: nothing can be quantized, a pattern asks for parameters of which none can be, a weight is not finite or has no
            data yet.
        ValueError: a pattern matches no parameter.
    """
    names: dict[int, list[str]] = {}
    plan = Selection()
    everything = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in everything:
        names.setdefault(id(parameter), []).append(name)
        plan.parameters[id(parameter)] = parameter
    known = [name for name, _ in everything]
    for method in choice.methods:
        check_patterns(method.exclude, known, "exclude pattern", caller)
    if known:
        check_patterns([pattern for pattern, _ in choice.entries], known, "pattern", caller)
    adapters = _adapter_parameters(model)
    for key, parameter in plan.parameters.items():
        name, *aliases = names[key]
        owner, _ = owner_of(model, name)
        _, method = choice.entry_for(names[key]) or ("", None)
        reason = _reason_to_skip(owner, names[key], parameter, method) if method else "no pattern of the mapping matches it"
        if key in adapters:
            reason = "a PEFT adapter"
        if reason or method is None:
            plan.skipped.append(SkippedWeight(name, tuple(parameter.shape), reason))
            continue
        _check_values(name, parameter, caller, method.scale_type)
        group_size, range_size, grid = method.layout
        spec = WeightSpec(
            name=name,
            aliases=tuple(aliases),
            shape=tuple(parameter.shape),
            axis=int(isinstance(owner, nn.modules.conv._ConvTransposeNd)),
            dtype=parameter.dtype,
            group_size=group_size,
            range_size=range_size,
            grid=grid,
            scale_dtype=method.scale_type,
        )
        if spec.range_layout.num_groups >= spec.numel:
            reason = f"shaped {spec.shape}: a range for each weight takes more than its float"
            plan.skipped.append(SkippedWeight(name, spec.shape, reason))
            continue
        plan.methods[key], plan.specs[key] = method, spec
    if not plan.specs:
        seen = "; ".join(f"{s.name} {s.shape}: {s.reason}" for s in plan.skipped[:8]) or "it has no parameters"
        raise PreparationError(f"{caller}: the {type(model).__name__} has no weight to quantize ({seen}).")
    _check_answered(choice, plan, names, caller)
    return plan


def _adapter_parameters(model: nn.Module) -> set[int]:
    """The adapters of PEFT (LoRA and its like), by identity; its layers say in ``adapter_layer_names`` where they hold them."""
    held = (getattr(module, name, None) for module in model.modules() for name in getattr(module, "adapter_layer_names", ()))
    return {id(parameter) for each in held if isinstance(each, nn.Module) for parameter in each.parameters()}


def _check_answered(choice: MethodChoice, plan: Selection, names: dict[int, list[str]], caller: str) -> None:
    """Refuse a pattern that asks for parameters of which its method can quantize none."""
    for pattern, method in choice.entries:
        asked = [key for key, own in names.items() if any(matches(name, pattern) for name in own)]
        if any(key in plan.specs for key in asked):
            continue
        first = [names[key][0] for key in asked[:4]]
        seen = "; ".join(f"{skipped.name}: {skipped.reason}" for skipped in plan.skipped if skipped.name in first)
        raise PreparationError(
            f"{caller}: pattern {pattern!r} asks for {type(method).__name__} where nothing can be quantized ({seen}). "
            "Change the pattern or leave it out."
        )


def check_patterns(patterns: Iterable[str], names: list[str], what: str, caller: str) -> None:
    """Refuse a pattern that matches none of these names."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            known = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(f"{caller}: {what} {pattern!r} matches no parameter. The model has {known}.")


def _reason_to_skip(owner: nn.Module, names: Sequence[str], parameter: Tensor, method: Method) -> str:
    """Why this parameter stays in float; empty if it does not."""
    if not parameter.is_floating_point():
        return f"{parameter.dtype}: not a float type"
    for pattern in method.exclude:
        if any(matches(each, pattern) for each in names):
            return f"excluded by {pattern!r}"
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
            return "sparse=True: its gradient is a sparse tensor; with sparse=False it is quantized"
    return ""


def _check_values(name: str, parameter: Tensor, caller: str, scale_type: torch.dtype) -> None:
    if type(parameter.data) is not Tensor:
        raise PreparationError(
            f"{caller}: weight {name!r} is a {type(parameter.data).__name__}, quantized or distributed already. Prepare the float model."
        )
    low, high = torch.aminmax(parameter.detach())
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        if (largest := float(torch.maximum(-low, high))) > torch.finfo(scale_type).max:
            raise PreparationError(
                f"{caller}: weight {name!r} has a value of size {largest:.4g}, and scales of {scale_type} reach "
                f'{torch.finfo(scale_type).max:.0f}. Use scale_dtype="float32".'
            )
        if 0 < largest < (least := torch.finfo(scale_type).smallest_normal / 8):
            raise PreparationError(
                f"{caller}: weight {name!r} has no value larger than {largest:.2g}, and scales of {scale_type} are too coarse below "
                f'{least:.2g}. Use scale_dtype="float32", or leave it in float with exclude=({name!r},).'
            )
        return
    bad = ~torch.isfinite(parameter.detach())
    first = [int(i) for i in bad.nonzero()[0]]
    value = parameter.detach()[tuple(first)].item()
    raise PreparationError(
        f"{caller}: weight {name!r} of shape {tuple(parameter.shape)} has {int(bad.sum())} non-finite values\n"
        f"  first at {first}: {value}; a range needs finite weights.\n"
        f"  Repair the checkpoint, or leave this weight in float with exclude=({name!r},)."
    )
