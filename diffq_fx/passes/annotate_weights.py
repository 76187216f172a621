"""Mark the nodes that read a weight to quantize, and learn from their readers which axis is the output."""

from collections.abc import Sequence
from dataclasses import replace

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.passes.runner import attribute_of, module_of
from diffq_fx.selection import Selection
from diffq_fx.weights import WeightSpec

META_KEY = "weight_spec"
"""Where a get_attr node carries the :class:`WeightSpec` of the weight it reads."""

Reader = tuple[str, int | None]
"""The name of a function or module that reads a weight, and which of its positional arguments the weight is."""

_RIGHT_FACTOR = {"matmul": 1, "__matmul__": 1, "mm": 1, "bmm": 1, "addmm": 2, "baddbmm": 2}
"""Which argument is ``w`` in ``x @ w``: its output channels are its last axis."""


def annotate_weights(gm: fx.GraphModule, selection: Selection) -> PassResult:
    """Give every get_attr node of a selected weight its WeightSpec.

    The specs of the selection are completed: by their consumer, and the axis where a matrix product shows that output channels come last.
    """
    modified = False
    for node in gm.graph.find_nodes(op="get_attr"):
        parameter = attribute_of(gm, node.target)
        spec = selection.spec_of(parameter)
        if spec is None or node.meta.get(META_KEY) == spec:
            continue
        if not spec.consumer:
            spec = selection.specs[id(parameter)] = completed(spec, [_reader(gm, user, node) for user in node.users])
        node.meta[META_KEY] = spec
        modified = True
    return PassResult(gm, modified)


def completed(spec: WeightSpec, readers: Sequence[Reader]) -> WeightSpec:
    """The spec with the names of what reads the weight; the first reader tells the axis of the output channels."""
    name, position = readers[0] if readers else ("nothing", None)
    axis = spec.axis
    if name.startswith("conv_transpose"):
        axis = 1
    elif position is not None and _RIGHT_FACTOR.get(name) == position:
        axis = len(spec.shape) - 1
    return replace(spec, consumer=", ".join(dict.fromkeys(each for each, _ in readers)) or name, axis=axis)


def _reader(gm: fx.GraphModule, user: fx.Node, weight: fx.Node) -> Reader:
    if user.op == "call_module":
        return type(module_of(gm, user)).__name__, None
    position = next((i for i, each in enumerate(user.args) if each is weight), None)
    return getattr(user.target, "__name__", str(user.target)), position
