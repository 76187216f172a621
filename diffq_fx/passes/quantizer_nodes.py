"""The nodes on weights: quantizers put in for training, and replaced by stored integers in the end; each checked after the rewrite."""

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.errors import PassError
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.passes.annotate_weights import META_KEY
from diffq_fx.passes.runner import module_of
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX


def insert_quantizers(gm: fx.GraphModule) -> PassResult:
    """Insert ``call_module[<weight>_quantizer](weight)`` after each annotated ``get_attr[<weight>]``.

    In DiffQ that node is the pseudo quantization noise. The quantizer modules must be registered beside their weights. One node
    serves all readers of the weight in this graph, so a weight that is used twice gets one draw of noise a forward.
    """
    modified = False
    for node in gm.graph.find_nodes(op="get_attr"):
        readers = list(node.users)
        if META_KEY not in node.meta or any(isinstance(module_of(gm, reader), WeightQuantizer) for reader in readers):
            continue
        with gm.graph.inserting_after(node):
            quantized = gm.graph.call_module(f"{node.meta[META_KEY].name}{QUANTIZER_SUFFIX}", (node,))  # of a tied weight, too
        for reader in readers:
            reader.replace_input_with(node, quantized)
        modified = True
    return PassResult(gm, modified)


def replace_quantizers(gm: fx.GraphModule) -> PassResult:
    """Turn ``call_module[<weight>_quantizer](get_attr[<weight>])`` into ``call_module[<weight>_quantized]()``.

    The stored weights must be registered beside the quantizers. Quantizers and float weights stay on the module; only the graph stops
    reading them.
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


def verify_prepared(gm: fx.GraphModule) -> PassResult:
    """Check that every annotated weight is read by its quantizer alone, once.

    Raises:
        PassError: names the weight and what reads it.
    """
    for node in gm.graph.nodes:
        spec = node.meta.get(META_KEY)
        if spec is None:
            continue
        readers = list(node.users)
        quantizers = [reader for reader in readers if isinstance(module_of(gm, reader), WeightQuantizer)]
        if len(quantizers) != 1 or len(readers) != 1:
            found = [reader.format_node() for reader in readers]
            raise PassError(f"weight {spec.name!r}: expected one reader, its quantizer; found {found}.")
        quantizer = module_of(gm, quantizers[0])
        if isinstance(quantizer, WeightQuantizer) and quantizer.spec.name != spec.name:
            raise PassError(f"weight {spec.name!r}: its node is read by the quantizer of {quantizer.spec.name!r}.")
    return PassResult(gm, False)


def verify_converted(gm: fx.GraphModule) -> PassResult:
    """Check that no quantizer is left, and that stored weights take the place of weights.

    Raises:
        PassError: names the node that is left.
    """
    modules = {node.name: module_of(gm, node) for node in gm.graph.nodes}
    for name, module in modules.items():
        if isinstance(module, WeightQuantizer):
            raise PassError(f"node {name!r} still quantizes weight {module.spec.name!r} at every forward.")
    if not any(isinstance(module, StoredWeight) for module in modules.values()):
        raise PassError("the graph reads no stored weight: it was not converted.")
    return PassResult(gm, False)
