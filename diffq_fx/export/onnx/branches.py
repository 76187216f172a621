"""Branches on a size: a trace takes one of them, at the example's size, and is wrong for the sizes that take another."""

from typing import Any

import torch
from torch import nn

from diffq_fx import _compat
from diffq_fx.export.onnx.examples import ExportExample

SIZE_ADVICE = "Leave this size static, or state its limits: torch.export.Dim(name, min=..., max=...)."
"""What to do where a size that is asked for decides a branch."""

_TAKEN_FOR_GRANTED = 2
"""torch.export takes no dynamic size for 0 or 1."""
_UNLIMITED = 2**31


def branches(model: nn.Module, program: torch.export.ExportedProgram, example: ExportExample, dynamic_shapes: Any = None) -> list[str]:
    """The sizes that a trace limits although the model runs beyond the limit too, each in words.

    Where the model does not run beyond it, the limit is the model's own (a table of positions); one in ``dynamic_shapes`` is the user's.

    Args:
        model: in eval mode.
        program: the model's trace with dynamic sizes.
        example: the user's example.
        dynamic_shapes: what the user has given.
    """
    stated = {limit for leaf in _compat.tree_leaves(dynamic_shapes) for limit in (getattr(leaf, "min", None), getattr(leaf, "max", None))}
    found = []
    for symbol, bounds in program.range_constraints.items():
        least, largest = _limits(bounds)
        limited = largest < _UNLIMITED
        beyond = [largest + 1] if limited and largest not in stated else []
        beyond += [least - 1] if least > _TAKEN_FOR_GRANTED and least not in stated else []
        places = _places(program, str(symbol))
        if places and any(_runs(model, example, places, int(size)) for size in beyond):
            number, axis = places[0]
            until = f"to {largest}" if limited else "on"
            found.append(f"the forward branches on size {axis} of input {number}, and the traced branch holds from {least} {until} alone")
    return found


def least_asked_for(dynamic_shapes: Any) -> int:
    """The largest ``min`` in ``dynamic_shapes``: above 1 a batch of one is not asked for."""
    return max((getattr(leaf, "min", None) or 0 for leaf in _compat.tree_leaves(dynamic_shapes)), default=0)


def _limits(bounds: Any) -> tuple[Any, Any]:
    """The least and the largest, as sympy's numbers."""
    return bounds.lower, bounds.upper


def _places(program: torch.export.ExportedProgram, symbol: str) -> list[tuple[int, int]]:
    """(input, axis) of every size that is the symbol."""
    users = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return [(number, axis) for number, tensor in enumerate(tensors) for axis, size in enumerate(tensor.shape) if str(size) == symbol]


def _runs(model: nn.Module, example: ExportExample, places: list[tuple[int, int]], size: int) -> bool:
    tensors = example.tensors
    for number, axis in places:
        index = torch.arange(size, device=tensors[number].device).clamp(max=tensors[number].shape[axis] - 1)
        tensors[number] = tensors[number].index_select(axis, index)
    try:
        example.replace(tensors).run(model)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return True
