"""Small questions that several passes ask a graph."""

from torch import fx, nn


def attribute_of(gm: nn.Module, target: str) -> object:
    """What a get_attr or call_module target names; None where it names nothing."""
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part, None)
        if value is None:
            return None
    return value


def module_of(gm: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls."""
    value = attribute_of(gm, str(node.target)) if node.op == "call_module" else None
    return value if isinstance(value, nn.Module) else None
