"""The size of a prepared model, as training sees it and as it will be."""

from typing import Literal, overload

import torch
from torch import Tensor, nn

from diffq_fx.arguments import check_flags
from diffq_fx.budget.size import MIB_BITS, mib
from diffq_fx.compression import Compression, require_compressions
from diffq_fx.parts import CHILD, parameters_outside, parts_of

_FLOAT_BITS = 32


@overload
def model_size(model: nn.Module, *, exact: Literal[False] = False) -> Tensor: ...


@overload
def model_size(model: nn.Module, *, exact: Literal[True]) -> float: ...


def model_size(model: nn.Module, *, exact: bool = False) -> Tensor | float:
    """Size of a prepared model in MiB: ``M(b) = sum_s n_s b_s`` over groups s, DiffQ (arXiv:2104.09987), and all that is stored beside.

    Differs from the paper: MiB are said to be MiB, and ranges and the coding of the widths are part of the differentiable size too. With
    ``size_of="packed_file"`` levels, scales and what is not quantized count at their entropy, buffers too.

    Args:
        model: prepared, or a module that holds prepared ones: the sum of all, and of its own parameters as float32.
        exact: the achievable size with whole widths, those that eval() and convert use.

    Returns:
        A differentiable 0-d tensor, without a device sync; with ``exact`` a float.

    Raises:
        PreparationError: the model is not prepared.

    Example:
        >>> from diffq_fx import prepare_diffq
        >>> prepared = prepare_diffq(torch.nn.Linear(64, 64), torch.zeros(1, 64))
        >>> size = model_size(prepared, exact=True) * 2**20  # bytes: at most 4 bits x 4096 weights and 4 bytes x 64 biases
        >>> 2290 < size <= 2304
        True
    """
    check_flags("model_size", exact=exact)
    own = vars(model).get(CHILD)
    compressions = [own] if isinstance(own, Compression) else require_compressions(model, "model_size")
    other_bits = 0
    if compressions != [own]:  # a loss has this in every step: no walk over a prepared model
        outside = parameters_outside(model, parts_of(model, Compression))
        other_bits = _FLOAT_BITS * sum(parameter.numel() for parameter in outside.values())
    if exact:
        return mib(sum(compression.exact_bits() for compression in compressions) + other_bits)
    for compression in compressions:
        compression.penalized = compression.penalized or torch.is_grad_enabled()
    return torch.stack([compression.expected_bits() for compression in compressions]).sum().add(other_bits) / MIB_BITS
