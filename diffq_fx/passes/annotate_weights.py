"""Mark the nodes that read a weight to quantize, and learn from their readers which axis is the output."""

from dataclasses import replace

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.passes._graph import attribute_of, module_of
from diffq_fx.selection import Selection
from diffq_fx.weights import WeightSpec

META_KEY = "weight_spec"
"""Where a get_attr node carries the :class:`WeightSpec` of the weight it reads."""

_TRANSPOSED = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
_TRANSPOSED |= {getattr(torch.nn.functional, f"conv_transpose{n}d") for n in (1, 2, 3)}
_MATMUL = {torch.matmul, torch.mm, torch.bmm}
_ADDMM = {torch.addmm, torch.baddbmm}


def annotate_weights(gm: fx.GraphModule, selection: Selection) -> PassResult:
    """Give every get_attr node of a selected weight its WeightSpec.

    The spec's consumer is set, and its axis where a matrix product shows that the output channels come last. A tied weight keeps
    what its first reader says.

    Args:
        gm: a captured graph in which weights are get_attr nodes.
        selection: the weights to quantize; its specs are completed.

    Returns:
        The same GraphModule; modified if a node was newly marked.
    """
    modified = False
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        parameter = attribute_of(gm, node.target)
        spec = selection.spec_of(parameter)
        if spec is None or node.meta.get(META_KEY) == spec:
            continue
        if not spec.consumer:
            spec = _completed(gm, node, spec)
            selection.specs[id(parameter)] = spec
        node.meta[META_KEY] = spec
        modified = True
    return PassResult(gm, modified)


def _completed(gm: fx.GraphModule, node: fx.Node, spec: WeightSpec) -> WeightSpec:
    """The spec with what the first reader of the weight tells."""
    reader = next(iter(node.users), None)
    if reader is None:
        return replace(spec, consumer="nothing")
    if reader.op == "call_module":
        return replace(spec, consumer=type(module_of(gm, reader)).__name__)
    name = getattr(reader.target, "__name__", str(reader.target))
    last = spec.axis
    if reader.target in _TRANSPOSED:
        last = 1
    elif _is_right_factor(reader, node):
        last = len(spec.shape) - 1
    return replace(spec, consumer=name, axis=last)


def _is_right_factor(reader: fx.Node, weight: fx.Node) -> bool:
    """Whether the reader computes ``x @ weight``, whose output channels are the weight's last axis."""
    name = getattr(reader.target, "__name__", reader.target)
    if name == "linear":
        return False
    if reader.target in _ADDMM or name in ("addmm", "baddbmm"):
        return len(reader.args) > 2 and reader.args[2] is weight
    if reader.target in _MATMUL or name in ("matmul", "mm", "bmm", "__matmul__"):
        return len(reader.args) > 1 and reader.args[1] is weight
    return False
