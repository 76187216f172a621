"""The gate: a prepared model computes what the original computes, and every weight reaches it through its quantizer alone.

One experiment shows both, on copies: no value that the user holds is written. Each quantizer hands out the true weight (noise off), and
the weights themselves are NaN. If output, arguments, buffers and gradients still equal the original's bit by bit, in train, eval and
eval without grad, then nothing was changed and nothing reads a weight past its quantizer. No hook is installed, since hooks switch fast
paths off.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.capture.contents import pieces_of
from diffq_fx.capture.copies import passing_copy
from diffq_fx.errors import CaptureError, first_line
from diffq_fx.example import MODES, Example
from diffq_fx.functional.precision import widened
from diffq_fx.methods.base import WeightQuantizer

_Gradients = dict[str, Tensor | None]


class Reference:
    """What the original model does with the example, and what it leaves behind."""

    def __init__(self, model: nn.Module, twin: nn.Module, example: Example) -> None:
        """Run a twin of the original, with parameters of its own."""
        weights = dict(twin.named_parameters())
        outcomes = (_outcome(twin, example, mode, weights) for mode in MODES)
        self.outcomes = [_compat.map_tensors(_without_history, outcome) for outcome in outcomes]  # no graph kept alive
        """For each of ``MODES`` what it gives, by what it is called in messages."""
        self.left = _left_behind(model, twin, weights)
        """Buffers after the calls, and the parameters that a forward has changed."""


def _without_history(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _left_behind(model: nn.Module, twin: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a twin's forwards left in buffers, and in parameters that are not the model's any more."""
    before = dict(model.named_parameters())
    changed = {name: each.detach() for name, each in parameters.items() if name in before and not torch.equal(each, before[name])}
    return {name: each.detach().clone() for name, each in twin.named_buffers()}, changed


def _outcome(model: nn.Module, example: Example, mode: Any, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Run a model; in train mode also backward, from every output to parameters and inputs."""
    backward = mode == "train"
    try:
        output, arguments, leaves = example.outcome(model, mode, inputs_require_grad=backward)
    except Exception:  # the user's forward may refuse an input that has a history
        if not backward:
            raise
        output, arguments, leaves = example.outcome(model, mode)
    found = {"the output": output, "the arguments after the call": (arguments.args, arguments.kwargs)}
    if backward:
        named = {f"input {index}": leaf for index, leaf in enumerate(leaves)} | dict(parameters)
        found["the gradients"] = _gradients(output, {name: each for name, each in named.items() if each.requires_grad})
    return found


def _gradients(output: Any, leaves: Mapping[str, Tensor]) -> _Gradients | str:
    """The gradients of a loss that weighs every element of the output differently; what the backward raises is an outcome too."""
    if not leaves:  # a model that is frozen, and whose inputs are integers
        return {}
    generator, outputs = torch.Generator().manual_seed(1), [each for each in _tensors_within(output) if each.requires_grad]
    weights = [torch.randn(each.shape, generator=generator, dtype=torch.float32).to(each) for each in outputs]
    try:
        torch.autograd.backward(outputs, weights, inputs=list(leaves.values()))
    except Exception as err:  # the user's backward may raise anything  # noqa: BLE001
        return f"a {first_line(err)}"
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return gradients


def _tensors_within(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors of an output of any type, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value).values():
            yield from _tensors_within(part, seen)


def _difference(found: Any, expected: Any, what: str, seen: dict[tuple[int, int], Any] | None = None) -> str:
    """What differs between two results; empty if they are the same bit by bit, in containers of the same types."""
    seen = {} if seen is None else seen
    if found is expected or isinstance(found, nn.Module) or (id(found), id(expected)) in seen:
        return ""
    seen[id(found), id(expected)] = (found, expected)  # objects may hold each other; kept alive, so that no id is used again
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return _tensor_difference(found, expected, what)
    if type(found) is not type(expected):
        return f"{what} is a {type(found).__name__}, the original's a {type(expected).__name__}"
    if isinstance(found, int | float | complex | str | bytes):
        return "" if found == expected or found != found else f"{what} is {found!r}, the original's {expected!r}"
    found_parts, expected_parts = _parts(found), _parts(expected)
    if found_parts.keys() != expected_parts.keys():
        return f"{what} holds {list(found_parts)}, the original's {list(expected_parts)}"
    differences = (_difference(part, expected_parts[key], f"{what}[{key!r}]", seen) for key, part in found_parts.items())
    return next(filter(None, differences), "")


@torch.no_grad()
def _tensor_difference(found: Tensor, expected: Tensor, what: str) -> str:
    if _kind(found) != _kind(expected):
        return f"{what} is {_kind(found)}, the original's {_kind(expected)}"
    for a, b in zip(_strided_parts(found), _strided_parts(expected), strict=True):
        if a.shape != b.shape:
            return f"{what} has {a.shape[-1]} entries, the original's {b.shape[-1]}"
        same = (a == b) | ((a != a) & (b != b))
        if not bool(same.all()):
            worst = (widened(a) - widened(b)).abs().nan_to_num(nan=float("inf")).max().item()
            return f"{int((~same).sum())} of {same.numel()} values of {what} differ, by up to {worst:.3g}"
    return ""


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    """The tensor, or the ordinary tensors that a sparse one is made of."""
    if not str(tensor.layout).startswith("torch.sparse"):
        return [tensor]
    listed = tensor.to_sparse_coo().coalesce()
    return [listed.indices(), listed.values()]


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f"{tensor.layout} "
    return f"{layout}{tensor.dtype} {tuple(tensor.shape)}" + " that requires grad" * tensor.requires_grad


def _parts(value: Any) -> dict[Any, Any]:
    return {} if isinstance(value, type) or callable(value) else pieces_of(value) or {}


def _gradient_difference(found: _Gradients | str, expected: _Gradients | str) -> str:
    """What differs between two sets of gradients; empty if they are the same, or as close as another order of summation leaves them.

    A graph sums in the order of the original, but for a weight with several readers, and on a GPU, whose kernels sum in any order. Close
    means a difference below the square root of the type's precision, so a gradient that is lost, doubled or reversed is never close.
    """
    if isinstance(found, str) or isinstance(expected, str):
        mine, wanted = (each if isinstance(each, str) else "gradients" for each in (found, expected))
        of_one_type = mine.partition(":")[0] == wanted.partition(":")[0]  # texts may hold addresses
        return "" if of_one_type else f"the backward gives {mine}, the original's {wanted}"
    for name, gradient in expected.items():
        mine, what = found.get(name), f"the gradient of {name}"
        if gradient is None or mine is None:
            if mine is not gradient:
                return f"{what} is {'none' if mine is None else 'there'}, the original's {'none' if gradient is None else 'there'}"
        elif (difference := _tensor_difference(mine, gradient, what)) and not _is_close(mine, gradient, expected):
            return difference
    return ""


def _is_close(found: Tensor, expected: Tensor, gradients: _Gradients) -> bool:
    if (found.shape, found.layout) != (expected.shape, expected.layout) or found.layout is not torch.strided:
        return False
    close = torch.finfo(expected.dtype).eps ** 0.5
    scale = float(widened(expected).norm())
    if expected.device.type != "cpu":  # what cancels out to nothing is noise there
        largest = max(float(widened(each).norm()) for each in gradients.values() if each is not None and each.layout is torch.strided)
        scale = max(scale, close * largest)
    return float((widened(found) - widened(expected)).norm()) <= close * scale


def check_faithful(prepared: nn.Module, quantizers: Sequence[WeightQuantizer], example: Example, reference: Reference) -> None:
    """Compare what a prepared model does with what the original did, noise off and weights unreadable, on a copy.

    Raises:
        CaptureError: in which mode and by how much they differ, or what the prepared model raised.
    """
    memo: dict[int, Tensor] = {}
    readable: dict[str, nn.Parameter] = {}
    twins: dict[int, Any] = {}
    for quantizer in quantizers:
        weight = prepared.get_parameter(quantizer.spec.name)
        readable[quantizer.spec.name] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        nan = torch.full((1,), float("nan"), dtype=weight.dtype, device=weight.device)  # one value: no memory
        memo[id(weight)] = nn.Parameter(nan.expand(weight.shape), weight.requires_grad)
    with passing_copy(prepared, memo, twins) as twin:
        for quantizer in quantizers:
            twins[id(quantizer)].pass_through(partial(readable.__getitem__, quantizer.spec.name))
        difference = _first_difference(prepared, twin, readable, example, reference)
    readable.clear()  # the quantizers of the twin can still read it
    if difference:
        raise CaptureError(f"with noise off, {difference}")


def _first_difference(prepared: nn.Module, twin: nn.Module, readable: Mapping[str, Tensor], example: Example, reference: Reference) -> str:
    """Run a twin of a model as the original was run, and say what comes out different first."""
    parameters = dict(twin.named_parameters()) | dict(readable)
    for mode, expected in zip(MODES, reference.outcomes, strict=True):
        try:
            found = _outcome(twin, example, mode, parameters)
        except Exception as err:  # the user's forward may raise anything  # noqa: BLE001
            return f"in {mode} the model fails: {type(err).__name__}: {err}"
        if (use := vars(twin).get("graph_use")) and use.ended_by:
            return f"in {mode} {use.ended_by} by a module that the graph calls, and the forward reads it, which a graph would freeze"
        if past := _read_past(found["the output"], {id(prepared.get_parameter(name)): name for name in readable}):
            return f"in {mode} weight {past!r} is read from the model that was given, by a copy of it: a function or a global holds it"
        for what, value in expected.items():
            difference = _gradient_difference(found[what], value) if what == "the gradients" else _difference(found[what], value, what)
            if difference:
                return f"in {mode}: {difference}"
    buffers, changed = _left_behind(prepared, twin, parameters)
    wanted, wanted_changes = reference.left
    mine = {name: buffers.get(name) for name in wanted}
    return _difference(mine, wanted, "the buffers after the call") or _difference(changed, wanted_changes, "what changed of the parameters")


def _read_past(output: Any, weights: Mapping[int, str]) -> str:
    """The name of a weight of the prepared model itself, not of its twin, that an output of the twin depends on."""
    nodes = [each.grad_fn for each in _tensors_within(output) if each.grad_fn is not None]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        name = weights.get(id(getattr(node, "variable", None)))
        if name is not None:
            return name
        nodes.extend(each for each, _ in node.next_functions if each is not None)
    return ""


def unrepeatable(model: nn.Module, example: Example, reference: Reference) -> str:
    """What differs when the original model runs again from the same seed; empty if nothing does."""
    with passing_copy(model) as twin:
        return _first_difference(model, twin, {}, example, reference)
