"""Replace the quantizer nodes by nodes that make the weight of stored integers: noise out, real rounding in."""

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.passes._graph import module_of
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX


def replace_quantizers(gm: fx.GraphModule) -> PassResult:
    """Turn ``call_module[<weight>_quantizer](get_attr[<weight>])`` into ``call_module[<weight>_quantized]()``.

    The stored weights must be registered beside the quantizers. Quantizers and float weights stay on the module; only the graph stops
    reading them.

    Args:
        gm: a prepared graph.

    Returns:
        The same GraphModule; unmodified where it has no quantizer node.
    """
    modified = False
    for node in list(gm.graph.nodes):
        if not isinstance(module_of(gm, node), WeightQuantizer):
            continue
        with gm.graph.inserting_before(node):
            stored = gm.graph.call_module(str(node.target).removesuffix(QUANTIZER_SUFFIX) + STORED_SUFFIX)
        node.replace_all_uses_with(stored)
        (weight,) = node.all_input_nodes
        gm.graph.erase_node(node)
        if not weight.users:
            gm.graph.erase_node(weight)
        modified = True
    return PassResult(gm, modified)
