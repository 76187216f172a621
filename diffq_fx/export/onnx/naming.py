"""Readable names for inputs, outputs and dynamic sizes: "logits" rather than torch.onnx's "linear_14", "batch" for "s17"."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from diffq_fx.errors import ExportError

_FIRST_KEYS = "past_key_values.0.key"
PAST = "past_sequence_length"
"""The size of what a decoder has cached."""

Names = Sequence[str] | Mapping[str, str] | None


def check_names(option: str, names: Names, count: int | None = None) -> None:
    """Check what can be told of names before a model is traced.

    Raises:
        TypeError: They are no list and no dict of texts.
        ValueError: One is empty or given twice, or a list has not as many as there are.
    """
    if names is None:
        return
    texts = [*names, *names.values()] if isinstance(names, Mapping) else names
    if isinstance(names, str) or not isinstance(names, Mapping | Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{option} must be a list of names, or a dict from the default name to another, got {names!r}.")
    new = list(names.values() if isinstance(names, Mapping) else names)
    if twice := [name for name, times in Counter(new).items() if times > 1 or not name]:
        raise ValueError(f"{option} must be names that differ, got {twice[0]!r} in {new}.")
    if count is not None and not isinstance(names, Mapping) and len(names) != count:
        raise ValueError(f"{option} has {len(names)} names {list(names)} for {count} inputs.")


@dataclass(frozen=True)
class InterfaceNames:
    """What the user calls inputs and outputs: a list of all in their order, or default name -> name."""

    inputs: Names = None
    outputs: Names = None

    def apply(self, graph: ir.Graph, parameters: list[str], returned: Any) -> None:
        """Name inputs and outputs in place: as the user says, else by forward's parameters and the keys of what it returns.

        ``returned`` has the number of each output in its place.

        Raises:
            ExportError: A name is that of no input or output, of two of them, or of a weight; or there are not as many.
        """
        _own_outputs(graph)
        inputs = _chosen("input_names", self.inputs, _free(_dotted(parameters), "_in", set(graph.initializers)))
        defaults = _free(_dotted(_output_names(returned, len(graph.outputs))), "_out", {*graph.initializers, *inputs})
        outputs = _chosen("output_names", self.outputs, defaults)
        if clashes := [name for name, times in Counter([*graph.initializers, *inputs, *outputs]).items() if times > 1]:
            raise ExportError(f"the name {clashes[0]!r} is that of two inputs, outputs or parameters: inputs {inputs}, outputs {outputs}.")
        named = {*graph.inputs, *graph.outputs}
        wanted = {*inputs, *outputs}
        for value in [value for node in graph.all_nodes() for value in node.outputs if value not in named and value.name in wanted]:
            value.name = f"{value.name}.inner"
        for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
            value.name = name


def _own_outputs(graph: ir.Graph) -> None:
    """Give every output a value of its own: one may be an input, a constant, or given out twice."""
    seen: set[ir.Value] = set()
    for number, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[number] = node.outputs[0]
        seen.add(value)


def _chosen(option: str, names: Names, defaults: list[str]) -> list[str]:
    if isinstance(names, Mapping):
        if wrong := sorted(set(names) - set(defaults)):
            raise ExportError(f"{option} renames {wrong[0]!r}, which there is not: the default names are {defaults}.")
        return [names.get(name, name) for name in defaults]
    if names is not None and len(names) != len(defaults):
        raise ExportError(f"{option} has {len(names)} names {list(names)}, the model {len(defaults)}: {defaults}.")
    return defaults if names is None else list(names)


def _output_names(returned: Any, count: int) -> list[str]:
    """The keys of the mappings and named tuples that a model returns; "output", or "output_<number>", for the rest."""
    keys = dict(_keys(returned, ""))
    return [keys.get(number, "output" if count == 1 else f"output_{number}") for number in range(count)]


def _dotted(names: list[str]) -> list[str]:
    """Keys and values of a cache as optimum and onnxruntime-genai call them: "past_key_values.0.key", "present.0.key"."""
    return [re.sub(r"^(past_key_values|present)_(\d+)_(key|value)$", r"\1.\2.\3", name) for name in names]


def _free(names: list[str], ending: str, taken: set[str]) -> list[str]:
    """The names, with endings where one is taken or given before."""
    free: list[str] = []
    for name in names:
        while name in taken or name in free:
            name += ending
        free.append(name)
    return free


def _keys(returned: Any, name: str) -> Iterator[tuple[int, str]]:
    if hasattr(returned, "_asdict"):
        returned = returned._asdict()
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

    Those of a decoder with a cache are "sequence_length" (of what is new) and "past_sequence_length".
    Sizes that are not those of any input, and expressions such as ``2*batch``, follow. A second batch that the model keeps apart
    from the first one is "<input>_0".

    Returns:
        Old name -> new name.
    """
    names: dict[str, str] = {}
    of_decoder = {"input_ids_1": "sequence_length", f"{_FIRST_KEYS}_2": PAST}
    own = of_decoder if any(value.name == _FIRST_KEYS for value in graph.inputs) else {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            symbol = size.value if isinstance(size, ir.SymbolicDim) else None
            if symbol is not None and symbol.isidentifier() and symbol not in names:
                default = "batch" if axis == 0 and "batch" not in names.values() else f"{value.name}_{axis}"
                names[symbol] = own.get(default, default)
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
    renamed = ir.SymbolicDim(pattern.sub(lambda match: names[match[1]], size.value))
    try:
        renamed.free_symbols()
    except ValueError:  # an expression with a function that no size in ONNX has, such as a remainder
        return ir.SymbolicDim(None)
    return renamed
