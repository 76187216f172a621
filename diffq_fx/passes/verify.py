"""The contract of prepared and converted graphs, checked after every rewrite."""

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.errors import PassError
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.passes.annotate_weights import META_KEY
from diffq_fx.passes.runner import module_of
from diffq_fx.storage import StoredWeight


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
    stored = 0
    for node in gm.graph.nodes:
        module = module_of(gm, node)
        if isinstance(module, WeightQuantizer):
            raise PassError(f"node {node.name!r} still quantizes weight {module.spec.name!r} at every forward.")
        stored += isinstance(module, StoredWeight)
    if not stored:
        raise PassError("the graph reads no stored weight: it was not converted.")
    return PassResult(gm, False)
