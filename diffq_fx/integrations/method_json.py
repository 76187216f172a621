"""The methods of a model, and what a converted model remembers of its compression, as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from diffq_fx.convert import CompressionRecord
from diffq_fx.errors import PackedFileError
from diffq_fx.methods import Method
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.weights import SkippedWeight

_PLAIN = [each.name for each in fields(CompressionRecord) if each.name not in ("method", "skipped", "rest_numel")]


def choice_to_json(choice: MethodChoice) -> list[list[Any]]:
    """Pattern, class and settings of each method.

    Example:
        >>> from diffq_fx.methods import STE
        >>> choice = MethodChoice.of({"head": STE(bits=8), "*": STE(bits=4)}, "prepare")
        >>> choice_of_json(choice_to_json(choice)) == choice
        True
    """
    return [[pattern, type(method).__name__, _without_tuples(asdict(method))] for pattern, method in choice.entries]


def choice_of_json(value: list[list[Any]]) -> MethodChoice:
    """Undo :func:`choice_to_json`; an error if a method is not known here."""
    known = {kind.__name__: kind for kind in _kinds(Method)}
    for _, name, _ in value:
        if name not in known:
            raise PackedFileError(
                f"the model was compressed with {name}, which is no method here. Import the module that defines it first."
            )
    return MethodChoice(tuple((pattern, known[name](**_with_tuples(settings))) for pattern, name, settings in value))


def record_to_json(record: CompressionRecord) -> dict[str, Any]:
    """What a converted model remembers; what follows from the model itself is left out."""
    skipped: dict[str, list[str]] = {}
    for each in record.skipped:
        skipped.setdefault(each.reason, []).append(each.name)
    facts = _without_tuples({name: getattr(record, name) for name in _PLAIN})
    return {"method": choice_to_json(record.method), "skipped": skipped, **facts}


def record_of_json(value: Mapping[str, Any], model: nn.Module) -> CompressionRecord:
    """Undo :func:`record_to_json` for a converted model."""
    reasons = {name: reason for reason, names in value["skipped"].items() for name in names}
    parameters = dict(model.named_parameters())
    return CompressionRecord(
        method=choice_of_json(value["method"]),
        skipped=tuple(SkippedWeight(name, tuple(each.shape), reasons[name]) for name, each in parameters.items() if name in reasons),
        rest_numel=sum(each.numel() for each in parameters.values()),
        **_with_tuples({name: value[name] for name in _PLAIN}),
    )


def _kinds(kind: type[Method]) -> Iterator[type[Method]]:
    for each in kind.__subclasses__():
        yield each
        yield from _kinds(each)


def _without_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
