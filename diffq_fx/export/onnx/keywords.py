"""Keyword arguments that a forward takes as ``**kwargs``, as PEFT's models and other wrappers do."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ANY = inspect.Parameter.VAR_KEYWORD


@contextmanager
def keywords_named(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let the forward's signature name them meanwhile: torch.export gives dynamic sizes to named arguments alone."""
    given = inspect.signature(model.forward)
    fixed = [each for each in given.parameters.values() if each.kind is not _ANY]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names if name not in given.parameters]
    if not added or len(fixed) == len(given.parameters):
        yield
        return
    before, forward = vars(model).get("forward"), model.forward

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    vars(named)["__signature__"] = given.replace(parameters=[*fixed, *added])
    model.forward = named
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
