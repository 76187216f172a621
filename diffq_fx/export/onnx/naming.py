"""Readable names for the dynamic sizes and the outputs of a graph: "batch" rather than torch.export's "s17", "logits" for "linear_14"."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir


def name_outputs(graph: ir.Graph, returned: Any) -> None:
    """Call outputs by the keys of the mappings that a model returns, in place; those of a plain tuple keep their names.

    Args:
        graph: the main graph.
        returned: what the model returns, with the number of each output in its place.
    """
    taken = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)
    taken |= {value.name for value in graph.inputs}
    for number, name in _keys(returned, ""):
        value = graph.outputs[number]
        if value.producer() is not None and name not in taken:
            value.name = name
            taken.add(name)


def _keys(returned: Any, name: str) -> Iterator[tuple[int, str]]:
    if isinstance(returned, Mapping):
        for key, inner in returned.items():
            yield from _keys(inner, f"{name}_{key}".lstrip("_"))
    elif isinstance(returned, list | tuple):
        for place, inner in enumerate(returned):
            yield from _keys(inner, name and f"{name}_{place}")
    elif isinstance(returned, int) and name:
        yield returned, name


def name_sizes(graph: ir.Graph) -> dict[str, str]:
    """Rename the symbolic sizes in place: the first size of an input is "batch", another "<input>_<axis>".

    Sizes that are not those of any input, and expressions such as ``2*batch``, follow. A second batch that the model keeps apart
    from the first one is "<input>_0".

    Returns:
        Old name -> new name.
    """
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            symbol = size.value if isinstance(size, ir.SymbolicDim) else None
            if symbol is not None and symbol.isidentifier() and symbol not in names:
                names[symbol] = "batch" if axis == 0 and "batch" not in names.values() else f"{value.name}_{axis}"
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else re.compile(r"(?!)")
    for value in [*graph.inputs, *graph.initializers.values(), *(output for node in graph.all_nodes() for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names, pattern) for size in value.shape])
    return names


def _renamed(size: int | ir.SymbolicDim, names: dict[str, str], pattern: re.Pattern[str]) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    if size.value.isdigit():  # a size that the model's own code fixes is written as a symbol of that name
        return int(size.value)
    return ir.SymbolicDim(pattern.sub(lambda match: names[match[1]], size.value))
