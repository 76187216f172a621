"""The nodes on weights: quantizers put in for training, and replaced by stored integers in the end."""

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.passes.annotate_weights import META_KEY
from diffq_fx.passes.runner import module_of
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX


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
    for node in gm.graph.find_nodes(op="get_attr"):
        readers = list(node.users)
        if META_KEY not in node.meta or any(isinstance(module_of(gm, reader), WeightQuantizer) for reader in readers):
            continue
        with gm.graph.inserting_after(node):
            quantized = gm.graph.call_module(f"{node.target}{QUANTIZER_SUFFIX}", (node,))
        for reader in readers:
            reader.replace_input_with(node, quantized)
        modified = True
    return PassResult(gm, modified)


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
    for node in gm.graph.find_nodes(op="call_module"):
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
