"""Run passes over one graph: lint, log what changed, say which pass broke what, and recompile at the end."""

import logging
from collections.abc import Callable, Sequence

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.errors import DiffQError, PassError

Pass = Callable[[fx.GraphModule], PassResult]

_log = logging.getLogger(__name__)


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass]) -> fx.GraphModule:
    """Apply passes in order, in place; gives the GraphModule of the last result.

    Raises:
        PassError: a pass failed or left a broken graph; names the pass and those that ran before it.
    """
    done: list[str] = []
    is_changed = False
    for each in passes:
        name = getattr(each, "__name__", None) or getattr(getattr(each, "func", None), "__name__", type(each).__name__)
        before = len(gm.graph.nodes)
        try:
            result = each(gm)
            if result.modified:
                result.graph_module.graph.lint()
                is_changed = True
        except DiffQError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as err:
            raise PassError(f"pass {name} failed after {done or 'no other pass'}: {err}") from err
        gm = result.graph_module
        _log.debug("%s: modified=%s, %d -> %d nodes", name, result.modified, before, len(gm.graph.nodes))
        done.append(name)
    if is_changed:
        gm.recompile()
    return gm


def attribute_of(gm: nn.Module, target: str) -> object:
    """What a get_attr or call_module target names; None where it names nothing."""
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part, None)
    return value


def module_of(gm: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls."""
    value = attribute_of(gm, str(node.target)) if node.op == "call_module" else None
    return value if isinstance(value, nn.Module) else None
