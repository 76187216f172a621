"""TorchAO: its ``quantize_`` as a way in, its integer tensors as a way out. Needs the package torchao.

Way in: torchao's own ``quantize_``, with its filter functions or its FqnToConfig, says which modules get which method;
:func:`prepare_marked` is the first of the two steps, ``diffq_fx.convert`` the second. Way out: :func:`to_torchao`.
"""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.errors import ConversionError, PreparationError
from diffq_fx.functional.groups import from_rows
from diffq_fx.integrations import missing
from diffq_fx.methods.base import Method
from diffq_fx.prepare import Scope, prepare_as
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.storage.footprint import Footprint

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise missing("torchao", error) from error

_MARK = "_diffq_fx_method"
_READERS = frozenset({"linear", "conv2d", "embedding"})
"""What torchao's integer tensor can be read by; any other function would fail on it."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 8


@dataclass
class PrepareConfig(AOBaseConfig):
    """A config for torchao's ``quantize_``: the modules that its filter lets through are marked for a method of diffq_fx.

    Marking changes nothing that a model computes; :func:`prepare_marked` does the work, since only the whole model shows which weights
    are tied and how large it is.

    Example:
        >>> from torchao.quantization import quantize_
        >>> from diffq_fx.methods import LSQ
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> quantize_(model, PrepareConfig(LSQ(bits=4)), lambda module, name: name == "2")
        >>> prepared = prepare_marked(model, torch.zeros(1, 16))
        >>> [quantizer.spec.name for quantizer in prepared.compression.quantizers]
        ['2.weight']
    """

    method: Method

    def __post_init__(self) -> None:
        """Refuse what is no method."""
        if not isinstance(self.method, Method):
            raise TypeError(f"PrepareConfig: expected a method of diffq_fx.methods (an object such as LSQ()), got {self.method!r}.")


@register_quantize_module_handler(PrepareConfig)
def _mark(module: nn.Module, config: PrepareConfig) -> nn.Module:
    setattr(module, _MARK, config.method)
    return module


def prepare_marked(model: nn.Module, example_inputs: Any, *, scope: Scope = "auto") -> nn.Module:
    """The first step for a model that torchao's ``quantize_`` has marked: ``diffq_fx.prepare`` with what the marks say.

    A tied weight is marked by any of its modules and stays one weight.

    Args:
        model: marked with :class:`PrepareConfig`. Its marks are taken off.
        example_inputs: what the model is called with, as for ``prepare``.
        scope: as for ``prepare``.

    Returns:
        The prepared model; train it, and then call ``diffq_fx.convert`` as the second step.

    Raises:
        PreparationError: nothing is marked, or a marked module has no weight to quantize.

    Example: see :class:`PrepareConfig`.
    """
    marked = [(path, module, vars(module)[_MARK]) for path, module in model.named_modules() if _MARK in vars(module)]
    if not marked:
        raise PreparationError(
            "prepare_marked: no module is marked. Call torchao's quantize_(model, PrepareConfig(method), filter_fn) first, with a filter "
            "that lets at least one module through."
        )
    deepest_first = sorted(marked, key=lambda each: -each[0].count("."))
    for _, module, _ in marked:
        delattr(module, _MARK)
    try:
        return prepare_as("prepare_marked", model, example_inputs, {_literal(path): method for path, _, method in deepest_first}, scope)
    except BaseException:
        for _, module, method in marked:
            setattr(module, _MARK, method)
        raise


def _literal(path: str) -> str:
    """A pattern that matches a path, and the root's, which is empty, everything."""
    return re.sub(r"([*?\[])", r"[\1]", path) or "*"


class TorchAOWeight(StoredWeight):
    """A weight as torchao's integer tensor; calling it gives that tensor, whose readers torchao dispatches.

    Parameters:
        weight: IntxUnpackedToInt8Tensor of the weight's shape, not trainable.
    """

    weight: nn.Parameter

    def __init__(self, stored: StoredWeight, integers: IntegerWeight) -> None:
        super().__init__()
        self.spec = stored.spec
        self._footprint = stored.footprint()
        self.weight = nn.Parameter(_integer_tensor(integers), requires_grad=False)

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


def to_torchao(converted: nn.Module) -> TorchAOResult:
    """Replace the integer weights of a converted model by torchao's integer tensors, wherever torchao has a form for them.

    Args:
        converted: from ``convert``; it is not changed.

    Returns:
        A copy that computes the same within float tolerance, and what became of each weight.

    Raises:
        ConversionError: the model holds no stored weight, or torchao has a form for none of them; says why for each.

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
    model = copy.deepcopy(converted)
    mapped: dict[nn.Module | None, TorchAOWeight] = {}
    kept: dict[str, str] = {}
    for stored in [module for module in model.modules() if isinstance(module, StoredWeight)]:
        integers = _integers_or_reason(stored)
        if isinstance(integers, str):
            kept[stored.spec.name] = integers
        else:
            mapped[stored] = TorchAOWeight(stored, integers)
    if not mapped:
        why = "\n  ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise ConversionError(f"to_torchao: torchao has a form for none of the weights.\n  {why}")
    for parent in list(model.modules()):
        parent._modules.update({name: mapped[child] for name, child in parent._modules.items() if child in mapped})
    return TorchAOResult(model, tuple(weight.spec.name for weight in mapped.values()), kept)


def _integers_or_reason(stored: StoredWeight) -> IntegerWeight | str:
    """The integers that torchao's tensor can hold, or why it cannot."""
    others = sorted({*stored.spec.consumer.split(", ")} - _READERS)
    if others:
        return f"read by {', '.join(others)}; torchao's integer tensor supports {', '.join(sorted(_READERS))}"
    if stored.spec.dtype not in _DTYPES:
        return f"{stored.spec.dtype}; torchao's integer tensor has {', '.join(str(dtype) for dtype in _DTYPES)}"
    integers = stored.as_integers() if isinstance(stored, CodebookWeight) else stored
    if not isinstance(integers, IntegerWeight):
        return "a codebook that is not integers times one scale"
    bits, layout = int(integers.bits.max()), integers.spec.scale_layout
    if bits > _WIDEST:
        return f"{bits} bits; torchao's integer tensor has 1 to {_WIDEST}"
    if layout.kind == "block" and (len(integers.spec.shape) > 2 or integers.spec.axis != 0):
        return f"blocks of {layout.block} in a weight of shape {integers.spec.shape}; torchao's blocks lie along one axis of a matrix"
    if layout.columns % layout.block:
        return f"blocks of {layout.block} do not divide its {layout.columns} inputs; torchao has whole blocks alone"
    return integers


def _integer_tensor(stored: IntegerWeight) -> IntxUnpackedToInt8Tensor:
    """Levels shifted to signed ones; zero points that are no integers are float ones, as is what a float grid's offset becomes."""
    spec, layout = stored.spec, stored.spec.scale_layout
    bits = int(stored.bits.max())
    half = 2 ** (bits - 1)
    qdata = from_rows((stored.levels_OI() - half).to(torch.int8), spec.shape, spec.axis).contiguous()
    if stored.zero_point is not None:
        zero_point = stored.zero_point - half
        zero_point = zero_point if (zero_point % 1).any() else zero_point.to(torch.int8)
    else:
        offset = stored.offset if stored.offset is not None else torch.zeros_like(stored.scale)
        zero_point = -half - offset / stored.scale
    shape = [1] * len(spec.shape)
    block = list(spec.shape)
    if layout.kind != "tensor":
        block[spec.axis], shape[spec.axis] = 1, spec.rows
    if layout.kind == "block":
        block[1], shape[1] = layout.block, layout.shape[1]
    return IntxUnpackedToInt8Tensor(
        qdata=qdata,
        scale=stored.scale.reshape(shape).float(),
        zero_point=zero_point.reshape(shape),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=tuple(block),
        dtype=spec.dtype,
        activation_quantization=None,
    )
