"""Branches on a size: a trace takes one of them, at the example's size, and is wrong for the sizes that take another."""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from diffq_fx import _compat
from diffq_fx.export.onnx.examples import FORWARD_ERRORS, ExportExample

SIZE_ADVICE = "Leave this size static, or state its limits: torch.export.Dim(name, min=..., max=...)."
"""What to do where a size that is asked for decides a branch."""

_TAKEN_FOR_GRANTED = 2
"""torch.export takes no dynamic size for 0 or 1."""
_UNLIMITED = 2**31
_SMALL = 128
_LARGEST = 2048
"""Sizes up to the one are looked at, and numbers up to the other that a condition of the model names."""
_MOST_POINTS = 8


def branches(model: nn.Module, program: torch.export.ExportedProgram, example: ExportExample, dynamic_shapes: Any = None) -> list[str]:
    """The sizes that a trace limits to a largest one although the model runs beyond it and gives something else, each in words.

    Where the model does not run beyond it, the limit is the model's own (a table of positions); one in ``dynamic_shapes`` is the user's.
    Where the trace gives the same beyond it, both sides of the branch compute the same (a tensor made contiguous).
    Limits from below are among the :func:`turning_points`: torch also makes them where no code asks (nothing has a size of 1).
    """
    stated, found = stated_limits(dynamic_shapes), []
    for symbol, (least, largest) in _limits(program).items():
        places = _places(program, symbol)
        if places and largest < _UNLIMITED and largest not in stated and _differs(model, program, example, places, int(largest) + 1):
            number, axis = places[0]
            found.append(
                f"the forward branches on size {axis} of input {number}, and the traced branch holds from {least} to {largest} alone"
            )
    return found


def stated_limits(dynamic_shapes: Any) -> set[int | None]:
    """The ``min`` and ``max`` in ``dynamic_shapes``."""
    return {limit for leaf in _compat.tree_leaves(dynamic_shapes) for limit in (getattr(leaf, "min", None), getattr(leaf, "max", None))}


def turning_points(
    program: torch.export.ExportedProgram, sizes: Mapping[str, int], stated: Set[int | None], may_be_nothing: Set[str] = frozenset()
) -> list[dict[str, int]]:
    """Sizes at which a trace may take another branch than the model, within its limits: 1, and where a condition turns.

    Whether the model itself has asked (``length != 7``) or torch (for a kernel), only a comparison at these sizes tells.
    ``sizes`` are the example's by symbol, ``stated`` the limits that the user gives; what is cached may be nothing when a text begins.
    """
    limits = {symbol: (_TAKEN_FOR_GRANTED, _UNLIMITED) for symbol in sizes} | _limits(program)
    least = 1 if _TAKEN_FOR_GRANTED in stated else _TAKEN_FOR_GRANTED
    single = [{**sizes, symbol: 1} for symbol, size in sizes.items() if size > 1 and limits[symbol][0] <= least]
    single += [{**sizes, symbol: 0} for symbol in may_be_nothing]
    least_of = {symbol: low for symbol, (low, _) in limits.items() if symbol in sizes and low not in stated}
    points = [{**sizes, symbol: int(low) - 1} for symbol, low in least_of.items() if low > _TAKEN_FOR_GRANTED]
    for condition in _compat.size_conditions(program):
        named = {symbol: str(symbol) for symbol in sorted(condition.free_symbols, key=str)}
        for symbol, name in named.items():
            if not set(named.values()) <= set(sizes):
                continue
            rest = condition.subs({other: sizes[each] for other, each in named.items() if other != symbol})
            numbers = {int(atom) + step for atom in condition.atoms() if atom.is_Integer for step in (-1, 0, 1)}
            low, high = limits[name]
            tried = (n for n in sorted({*range(2, _SMALL), *numbers}) if low <= n <= min(high, _LARGEST))
            points += [{**sizes, name: size} for size in tried if rest.subs(symbol, size) == False][:1]  # noqa: E712  sympy's false
    return single + [point for number, point in enumerate(points) if point not in points[:number]][:_MOST_POINTS]


def _limits(program: torch.export.ExportedProgram) -> dict[str, tuple[Any, Any]]:
    """Symbol -> the least and the largest size, as sympy's numbers."""
    ranges: Mapping[Any, Any] = program.range_constraints
    return {str(symbol): (bounds.lower, bounds.upper) for symbol, bounds in ranges.items()}


def input_values(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """The tensors that a program takes, by the parameters of forward, with symbolic sizes."""
    users = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    return {node.name: node.meta["val"] for node in nodes if isinstance(node.meta["val"], torch.Tensor)}


def _places(program: torch.export.ExportedProgram, symbol: str) -> list[tuple[int, int]]:
    """(input, axis) of every size that is the symbol."""
    tensors = enumerate(input_values(program).values())
    return [(number, axis) for number, tensor in tensors for axis, size in enumerate(tensor.shape) if str(size) == symbol]


def _differs(
    model: nn.Module, program: torch.export.ExportedProgram, example: ExportExample, places: list[tuple[int, int]], size: int
) -> bool:
    """Whether the model runs at a size, and the trace does not or gives something else."""
    shapes = [tuple(size if (number, axis) in places else n for axis, n in enumerate(t.shape)) for number, t in enumerate(example.tensors)]
    resized = example.resized(shapes)
    try:
        expected = resized.run(model)
    except FORWARD_ERRORS:
        return False
    traced = program.module(check_guards=False)
    traced._forward_pre_hooks.clear()  # they refuse the size
    try:
        found = resized.run(traced)
    except FORWARD_ERRORS:
        return True
    return not all(map(_close, found, expected))


def _close(found: Any, expected: Any) -> bool:
    is_tensor = isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor) and found.shape == expected.shape
    return is_tensor and torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
