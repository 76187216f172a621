"""TorchAO: quantization-aware training by its ``quantize_``, and its integer tensors as a way out. Needs the package torchao.

:class:`QATConfig` does both for users of torchao; :func:`to_torchao` takes what ``diffq_fx.convert`` gives.
"""

import copy
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from diffq_fx.capture.scope import ScopedModule, not_for_others
from diffq_fx.convert import convert
from diffq_fx.errors import ConversionError, DiffQWarning, PreparationError, missing
from diffq_fx.functional.groups import from_rows
from diffq_fx.methods.base import Method, WeightQuantizer
from diffq_fx.methods.fixed import FixedBitsQuantizer
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.parts import CHILD
from diffq_fx.prepare import prepare_as
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.footprint import Footprint
from diffq_fx.weights import STORED_SUFFIX, WeightSpec, owner_of

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.qat import QATConfig as FakeQuantization
    from torchao.quantization.qat.api import _qat_config_transform as fake_quantized
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise missing("torchao", error) from error

_READERS = frozenset({"linear", "conv2d", "embedding"})
"""What torchao's integer tensor can be read by; any other function would fail on it."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 8
_WIDEST_BLOCKS, _BLOCK_MULTIPLE = 4, 32
"""Of weights in blocks that ExecuTorch's XNNPACK multiplies with 8-bit activations."""

Activations = Literal["float", "int8"]


@dataclass
class QATConfig(AOBaseConfig):
    """Quantization-aware training in the form of torchao's own QATConfig: ``quantize_`` with step "prepare", train, with step "convert".

    Both steps change the model in place. What the filter lets through is prepared as one part, which meets the size in the method by
    itself: with :func:`whole_model` as the filter it is the model, and bits move between all layers; with torchao's own filter it is each
    linear layer. After "convert" layers are of their own classes again, with torchao's integer tensors as weights.

    Args:
        method: a config of :mod:`diffq_fx.methods`, or a mapping of patterns of state_dict names to configs. "convert" needs none.
        example_inputs: what the parts are called with, as for ``prepare``. A linear layer by itself needs none.
        step: "prepare" or "convert".
        activations: "float", or "int8" for linear layers that round their inputs to 8 bits, one scale a token, when they run. With at most
            4 bits a weight that is torchao's 8da4w, which ExecuTorch's XNNPACK runs. It takes symmetric grids alone.

    Raises:
        TypeError: step "prepare" without a method.
        ValueError: another step or other activations; in ``quantize_``, example inputs that the part does not run on.
        PreparationError: in ``quantize_``, as for ``prepare``.
        ConversionError: in ``quantize_``, as for ``convert`` and :func:`to_torchao`.

    Example:
        >>> from torchao.quantization import quantize_
        >>> from diffq_fx.methods import LSQ
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> quantize_(model, QATConfig(LSQ(bits=4), torch.zeros(1, 16), step="prepare"), whole_model)
        >>> quantize_(model, QATConfig(step="convert"), whole_model)  # after the training
        >>> type(model[0]).__name__, type(model[0].weight).__name__
        ('Linear', 'IntxUnpackedToInt8Tensor')
    """

    method: Method | Mapping[str, Method] | None = None
    example_inputs: Any = None
    step: Literal["prepare", "convert"] = field(default="prepare", kw_only=True)
    activations: Activations = field(default="float", kw_only=True)

    def __post_init__(self) -> None:
        """Refuse other settings."""
        if self.step not in ("prepare", "convert"):
            raise ValueError(f'QATConfig: step must be "prepare" or "convert", got {self.step!r}.')
        _check_activations("QATConfig", self.activations)
        if self.step == "prepare":
            MethodChoice.of(cast("Method", self.method), "QATConfig")


def whole_model(module: nn.Module, name: str) -> bool:
    """A filter for ``quantize_`` that lets the model itself through, as one part.

    Args:
        module: what ``quantize_`` asks about.
        name: its path in the model.

    Returns:
        Whether it is the model.

    Example: see :class:`QATConfig`.
    """
    return not name


def _check_activations(caller: str, activations: str) -> None:
    if activations not in get_args(Activations):
        raise ValueError(f'{caller}: activations must be "float" or "int8", got {activations!r}.')


@register_quantize_module_handler(QATConfig)
def _quantize(module: nn.Module, config: QATConfig) -> nn.Module:
    """What ``quantize_`` does to each module that its filter lets through; it takes no other module for the model itself."""
    if config.step == "prepare":
        example = config.example_inputs
        if example is None and type(module) is nn.Linear:
            example = module.weight.new_zeros(1, module.in_features)
        if example is None:
            raise PreparationError(
                f"QATConfig: a {type(module).__name__} needs example_inputs: give QATConfig(method, example_inputs) what it is called with."
            )
        prepared = prepare_as("QATConfig", module, example, cast("Method", config.method), "module")
        _warn_of({each.spec.name: why for each in vars(prepared)[CHILD].quantizers if (why := _reason_against_prepared(each))}, "will stay")
        _become(module, prepared)
    else:
        result = to_torchao(convert(module), activations=config.activations)
        _warn_of(result.kept, "stay")
        _give_classes_back(result.model)
        _become(module, result.model)
        if "transformers.modeling_utils" in sys.modules:
            from diffq_fx.integrations.hf_torchao import tell

            tell(module)
    return module


def _warn_of(reasons: Mapping[str, str], stay: str) -> None:
    """Name the weights that torchao has no form for."""
    if reasons:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(
            f"QATConfig: weights for which torchao has no form {stay} as diffq_fx stores them. {why}. save_pretrained writes no model that "
            "has both; it writes what diffq_fx.prepare and diffq_fx.convert make.",
            DiffQWarning,
            stacklevel=3,
        )


@register_quantize_module_handler(FakeQuantization)
def _fake_quantize(module: nn.Module, config: FakeQuantization) -> nn.Module:
    """torchao's own handler, which would put a layer that computes without our quantizer in the place of one of ours."""
    if isinstance(module, ScopedModule) and module.taken_over.owned:
        raise not_for_others(module, module.taken_over.owned[0], "weight of torchao's QATConfig")
    return fake_quantized(module, config)


def _become(module: nn.Module, other: nn.Module) -> None:
    vars(module).clear()
    module.__class__ = type(other)
    vars(module).update(vars(other))


def _give_classes_back(model: nn.Module) -> None:
    """Make torchao's tensors parameters, and the modules that read no other quantized weight what they were before ``prepare``."""
    for module in list(model.modules()):
        for name, held in list(module._modules.items()):
            if isinstance(held, TorchAOWeight) and name.endswith(STORED_SUFFIX) and isinstance(module, ScopedModule):
                del module._modules[name]
                module._parameters[name.removesuffix(STORED_SUFFIX)] = held.weight
    for module in model.modules():
        if isinstance(module, ScopedModule):
            read = [owner_of(module, name) for name in (*module.taken_over.weights, *module.taken_over.owned)]
            if all(attribute in owner._parameters for owner, attribute in read):
                module.__class__ = module.original_class


class TorchAOWeight(StoredWeight):
    """A weight as torchao's integer tensor; calling it gives that tensor, whose readers torchao dispatches.

    Parameters:
        weight: IntxUnpackedToInt8Tensor of the weight's shape, not trainable.
    """

    weight: nn.Parameter

    def __init__(self, stored: StoredWeight, integers: IntegerWeight, activations: Activations = "float") -> None:
        super().__init__(stored.spec, integers.levels.device)
        self._footprint = stored.footprint()
        self.weight = nn.Parameter(_integer_tensor(integers, activations), requires_grad=False)

    def forward(self) -> Tensor:
        """The integer tensor."""
        return self.weight

    def footprint(self) -> Footprint:
        """The parts of its sizes as they were stored; torchao's container is a byte."""
        return self._footprint


@dataclass(frozen=True)
class TorchAOResult:
    """What :func:`to_torchao` made."""

    model: nn.Module
    mapped: tuple[str, ...]
    """Weights that are torchao's integer tensors now."""
    kept: dict[str, str] = field(default_factory=dict)
    """Weight -> why torchao has no form for it; it stays as diffq_fx stores it, and the model computes the same."""


def to_torchao(converted: nn.Module, *, activations: Activations = "float") -> TorchAOResult:
    """Replace the integer weights of a converted model by torchao's integer tensors, wherever torchao has a form for them.

    Args:
        converted: from ``convert``; it is not changed.
        activations: "float", or "int8" for linear layers that round their inputs to 8 bits; see :class:`QATConfig`.

    Returns:
        A copy that computes the same within float tolerance and, with "int8", the rounding of the inputs; and what became of each weight.

    Raises:
        ConversionError: the model holds no stored weight, torchao has a form for none of them, or, with "int8", not for that of a linear
            layer; says why for each.
        ValueError: other activations.

    Example:
        >>> from diffq_fx import convert, prepare
        >>> from diffq_fx.methods import STE
        >>> result = to_torchao(convert(prepare(nn.Linear(16, 8), torch.zeros(1, 16), STE(bits=4))))
        >>> result.mapped, result.kept
        (('weight',), {})
    """
    if not any(isinstance(module, StoredWeight) for module in converted.modules()):
        raise ConversionError(
            f"to_torchao: the {type(converted).__name__} holds no stored weight. Call convert on the prepared model first."
        )
    _check_activations("to_torchao", activations)
    model = copy.deepcopy(converted)
    mapped: dict[nn.Module | None, TorchAOWeight] = {}
    kept: dict[str, str] = {}
    refused: dict[str, str] = {}
    for stored in [module for module in model.modules() if isinstance(module, StoredWeight)]:
        integers = _integers_or_reason(stored)
        if isinstance(integers, str):
            kept[stored.spec.name] = integers
        else:
            form = activations if "linear" in stored.spec.consumer.split(", ") else "float"
            if form == "int8" and (reason := _reason_against_int8(integers)):
                refused[stored.spec.name] = reason
            mapped[stored] = TorchAOWeight(stored, integers, form)
    if refused or not mapped:
        why = "\n  ".join(f"{name}: {reason}" for name, reason in (refused or kept).items())
        what = (
            "ExecuTorch's XNNPACK cannot multiply these weights with int8 activations"
            if refused
            else "torchao has a form for none of the weights"
        )
        raise ConversionError(f"to_torchao: {what}.\n  {why}")
    for parent in list(model.modules()):
        parent._modules.update({name: mapped[child] for name, child in parent._modules.items() if child in mapped})
    return TorchAOResult(model, tuple(weight.spec.name for weight in mapped.values()), kept)


def _integers_or_reason(stored: StoredWeight) -> IntegerWeight | str:
    """The integers that torchao's tensor can hold, or why it cannot."""
    integers = stored.as_integers()
    if not isinstance(integers, IntegerWeight):
        return "a codebook that is not integers times one scale"
    return _reason_against(integers.spec, int(integers.bits.max())) or integers


def _reason_against_prepared(quantizer: WeightQuantizer) -> str:
    """Why torchao will have no form for a weight, as far as that is known before the training; empty if it may have one."""
    return _reason_against(quantizer.spec, int(quantizer.rounded_bits().max()) if isinstance(quantizer, FixedBitsQuantizer) else 0)


def _reason_against(spec: WeightSpec, bits: int) -> str:
    """Why torchao's tensor cannot hold integers of so many bits; empty if it can."""
    layout, others = spec.scale_layout, sorted({*spec.consumer.split(", ")} - _READERS)
    if others:
        return f"read by {', '.join(others)}; torchao's integer tensor supports {', '.join(sorted(_READERS))}"
    if spec.dtype not in _DTYPES:
        return f"{spec.dtype}; torchao's integer tensor has {', '.join(str(dtype) for dtype in _DTYPES)}"
    if bits > _WIDEST:
        return f"{bits} bits; torchao's integer tensor has 1 to {_WIDEST}"
    if layout.kind == "block" and (len(spec.shape) > 2 or spec.axis != 0):
        return f"blocks of {layout.block} in a weight of shape {spec.shape}; torchao's blocks lie along one axis of a matrix"
    if layout.columns % layout.block:
        return f"blocks of {layout.block} do not divide its {layout.columns} inputs; torchao has whole blocks alone"
    return ""


def _reason_against_int8(stored: IntegerWeight) -> str:
    bits, layout = int(stored.bits.max()), stored.spec.scale_layout
    if stored.spec.grid != "symmetric":
        return f'a grid with zero points of its own ("{stored.spec.grid}"), which XNNPACK ignores; prepare with grid="symmetric"'
    if layout.kind == "block" and bits > _WIDEST_BLOCKS:
        return f"blocks of {bits} bits; XNNPACK has them up to {_WIDEST_BLOCKS}"
    if layout.kind == "block" and layout.block % _BLOCK_MULTIPLE:
        return f"blocks of {layout.block}; XNNPACK has multiples of {_BLOCK_MULTIPLE}"
    return ""


def _integer_tensor(stored: IntegerWeight, activations: Activations) -> IntxUnpackedToInt8Tensor:
    """Levels shifted to signed ones; zero points that are no integers are float ones, as is what a float grid's offset becomes.

    Those of a symmetric grid are zero whatever the width of a group.
    """
    spec, layout = stored.spec, stored.spec.scale_layout
    bits = int(stored.bits.max())
    half: int | Tensor = 2 ** (bits - 1)
    levels_OI, (scale, zero_point, offset) = stored.levels_OI(), stored.params
    if zero_point is not None and spec.grid == "symmetric":
        levels_OI, half = levels_OI - layout.expand(zero_point), zero_point
    else:
        levels_OI = levels_OI - half
    qdata = from_rows(levels_OI.to(torch.int8), spec.shape, spec.axis).contiguous()
    if zero_point is not None:
        zero_point = zero_point - half
        zero_point = zero_point if (zero_point % 1).any() else zero_point.to(torch.int8)
    else:
        zero_point = -half - (torch.zeros_like(scale) if offset is None else offset) / scale
    if activations == "int8":
        bits = _WIDEST_BLOCKS if bits <= _WIDEST_BLOCKS else _WIDEST
        if layout.kind == "tensor":  # XNNPACK has a scale for each channel
            layout = replace(layout, kind="channel")
            scale, zero_point = scale.expand(layout.shape), zero_point.expand(layout.shape)
    shape = [1] * len(spec.shape)
    block = list(spec.shape)
    if layout.kind != "tensor":
        block[spec.axis], shape[spec.axis] = 1, spec.rows
    if layout.kind == "block":
        block[1], shape[1] = layout.block, layout.shape[1]
    return IntxUnpackedToInt8Tensor(
        qdata=qdata,
        scale=scale.reshape(shape).float().contiguous(),
        zero_point=zero_point.reshape(shape).contiguous(),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=tuple(block),
        dtype=spec.dtype,
        activation_quantization="int8_asym_per_token" if activations == "int8" else None,
    )
