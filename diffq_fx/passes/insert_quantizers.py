"""Put a quantizer node between every annotated weight and all that reads it."""

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.passes._graph import module_of
from diffq_fx.passes.annotate_weights import META_KEY
from diffq_fx.weights import QUANTIZER_SUFFIX


def insert_quantizers(gm: fx.GraphModule) -> PassResult:
    """Insert ``call_module[<weight>_quantizer](weight)`` after each annotated ``get_attr[<weight>]``.

    In DiffQ that node is the pseudo quantization noise. The quantizer modules must be registered beside their weights. One node
    serves all readers of the weight in this graph, so a weight that is used twice gets one draw of noise a forward.

    Args:
        gm: a graph annotated by ``annotate_weights``.

    Returns:
        The same GraphModule; unmodified where every weight has its node already.
    """
    modified = False
    for node in list(gm.graph.nodes):
        if META_KEY not in node.meta or has_quantizer(gm, node):
            continue
        readers = list(node.users)
        with gm.graph.inserting_after(node):
            quantized = gm.graph.call_module(f"{node.target}{QUANTIZER_SUFFIX}", (node,))
        for reader in readers:
            reader.replace_input_with(node, quantized)
        modified = True
    return PassResult(gm, modified)


def has_quantizer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a weight's node is read by a quantizer."""
    return any(isinstance(module_of(gm, user), WeightQuantizer) for user in node.users)
