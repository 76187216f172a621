"""The sets of weights that are to share one width: those that a user's patterns name, or those that multiply the same input."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffq_fx.capture.copies import passing_copy
from diffq_fx.capture.uses import Given, WeightProduct, WeightUses, operators_in_parts
from diffq_fx.errors import PreparationError
from diffq_fx.example import Example
from diffq_fx.methods.diffq_settings import DiffQSettings
from diffq_fx.methods.mapping import captured, unique
from diffq_fx.selection import Selection, check_patterns


def note_width_sets(model: nn.Module, example: Example, selection: Selection, caller: str) -> None:
    """Number the sets of weights that share one width, as their methods ask for it, in their specs.

    Raises:
        PreparationError: weights that are to share a width have other settings than each other.
        ValueError: a pattern matches nothing, or no two weights that could share a width.
    """
    sets: list[set[int]] = []
    for method in unique(each for each in selection.methods.values() if isinstance(each, DiffQSettings) and each.same_width):
        if method.same_width == "same_input":
            found = _with_the_same_input(model, example, selection)
        else:
            found = [own for patterns in method.same_width or () for own in _by_patterns(patterns, model, selection, caller)]
        for own in found:
            if any(selection.methods[key] == method for key in own):
                _refuse_other_settings(own, method, selection, caller)
                sets = _joined(sets, own)
    for number, own in enumerate(sets):
        for key in own:
            selection.specs[key] = replace(selection.specs[key], width_set=number)


def _joined(sets: Iterable[set[int]], new: set[int]) -> list[set[int]]:
    """Sets without a common weight: to share a width is to share it with all that share it."""
    apart = [own for own in sets if own.isdisjoint(new)]
    return [*apart, new.union(*(own for own in sets if not own.isdisjoint(new)))]


def _by_patterns(patterns: Sequence[str], model: nn.Module, selection: Selection, caller: str) -> list[set[int]]:
    """Weights that these patterns match with the same text for their wildcards: the q, k and v of each layer."""
    check_patterns(patterns, [name for name, _ in model.named_parameters(remove_duplicate=False)], "same_width pattern", caller)
    sets: dict[tuple[str, ...], set[int]] = {}
    for pattern in patterns:
        for key, spec in selection.specs.items():
            for text in filter(None, (captured(name, pattern) for name in spec.names)):
                sets.setdefault(text, set()).add(key)
    found = [own for own in sets.values() if len(own) > 1]
    if not found:
        seen = ", ".join(selection.specs[key].name for own in sets.values() for key in own) or "weights that stay in float alone"
        raise ValueError(
            f"{caller}: same_width={tuple(patterns)} leaves no two weights to share a width; it matches {seen}. Weights share one where "
            "all wildcards of the patterns stand for the same text."
        )
    return found


def _with_the_same_input(model: nn.Module, example: Example, selection: Selection) -> list[set[int]]:
    """Weights of matrix products with the same input, found while the example runs on a copy of the model."""
    copies = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in selection.parameters.items()}
    keys = {spec.name: key for key, spec in selection.specs.items()}
    by_input: dict[tuple[object, ...], set[int]] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the address of one of them

    def on_product(name: str, product: WeightProduct) -> None:
        if (same := product.same_inputs) is not None and product.key is not None:
            by_input.setdefault(same, set()).add(keys[name])
            kept.append(product.key)

    uses = WeightUses([Given(spec, copies[key].detach()) for key, spec in selection.specs.items()], on_product, lambda *_: None)
    with passing_copy(model, copies) as twin, operators_in_parts(twin), torch.no_grad(), uses:
        example.outcome(twin, "eval without grad")
    return [own for own in by_input.values() if len(own) > 1]


def _refuse_other_settings(own: set[int], method: DiffQSettings, selection: Selection, caller: str) -> None:
    first = next(key for key in selection.specs if key in own and selection.methods[key] == method)
    for key in selection.specs:
        if key in own and selection.methods[key] != method:
            raise PreparationError(
                f"{caller}: weights {selection.specs[first].name!r} and {selection.specs[key].name!r} are to share one width "
                f"(same_width), and their configs differ: give both the same one, or name the sets by patterns without one of them."
            )
