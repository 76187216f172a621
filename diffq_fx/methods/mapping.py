"""Methods that differ per weight: a mapping of name patterns to methods, the first match decides."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from diffq_fx.methods.base import Method

_Config = TypeVar("_Config")
_WILDCARD = r"(\*|\?|\[!?\]?[^\]]*\])"


def matches(name: str, pattern: str) -> bool:
    """A pattern names a parameter, or a module with everything below it.

    Example:
        >>> matches("encoder.0.weight", "encoder"), matches("encoder.0.weight", "*.weight"), matches("encoder.0.weight", "coder")
        (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def captured(name: str, pattern: str) -> tuple[str, ...] | None:
    """What the wildcards of a pattern stand for in a name; None where it does not match.

    Example:
        >>> captured("layers.0.q.weight", "layers.*.q"), captured("layers.0.k.weight", "layers.*.q")
        (('0',), None)
    """
    groups = "".join(  # re.split has the wildcards at odd places
        {"*": "(.*)", "?": "(.)"}.get(part, f"({part.replace('[!', '[^', 1)})") if place % 2 else re.escape(part)
        for place, part in enumerate(re.split(_WILDCARD, pattern))
    )
    found = re.fullmatch(rf"{groups}(?:\..*)?", name, re.DOTALL)
    return found and found.groups()


def unique(configs: Iterable[_Config]) -> list[_Config]:
    """Equal configs once, in order; a config that holds a list cannot be hashed."""
    found: list[_Config] = []
    for config in configs:
        if config not in found:
            found.append(config)
    return found


@dataclass(frozen=True)
class MethodChoice:
    """Which method a weight gets: the first whose pattern matches one of its names. A single method is the choice ``{"*": method}``."""

    entries: tuple[tuple[str, Method], ...]

    @staticmethod
    def of(method: Method | Mapping[str, Method], caller: str) -> "MethodChoice":
        """Check what a user gave.

        Raises:
            TypeError: it is no method, or a mapping of something else.
            ValueError: the mapping is empty, or its methods disagree about a setting of the whole model.

        Example:
            >>> from diffq_fx import DiffQConfig
            >>> MethodChoice.of(DiffQConfig(), "prepare").name
            'DiffQConfig'
        """
        entries = tuple(method.items()) if isinstance(method, Mapping) else (("*", method),)
        for pattern, each in entries:
            if not isinstance(pattern, str) or not isinstance(each, Method):
                raise TypeError(
                    f"{caller}: expected a method (an object such as DiffQConfig()), or a mapping of name patterns to methods; "
                    f"got {pattern!r}: {each!r}."
                )
        if not entries:
            raise ValueError(f"{caller}: the mapping of name patterns to methods is empty.")
        dtypes = {pattern: each.rest_dtype for pattern, each in entries}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"{caller}: all methods of a mapping need the same rest_dtype, got {dtypes}.")
        for kind in dict.fromkeys(type(each) for _, each in entries):
            for setting in kind.whole_model:
                found = {pattern: getattr(each, setting) for pattern, each in entries if type(each) is kind}
                if len(set(found.values())) > 1:
                    name = kind.__name__
                    raise ValueError(
                        f"{caller}: {setting} concerns the whole model: give each {name} of the mapping the same, got {found}."
                    )
        return MethodChoice(entries)

    def entry_for(self, names: Sequence[str]) -> tuple[str, Method] | None:
        """Pattern and method of the weight with these names; None where no pattern matches."""
        return next((entry for entry in self.entries if any(matches(name, entry[0]) for name in names)), None)

    @property
    def methods(self) -> list[Method]:
        """The methods, each once."""
        return unique(method for _, method in self.entries)

    @property
    def rest_dtype(self) -> Literal["float32", "float16"]:
        """What is not quantized is counted and exported in this type."""
        return self.entries[0][1].rest_dtype

    @property
    def rest_width(self) -> int:
        """Bits of a parameter that is not quantized, whatever its own type: files may keep it so."""
        return 16 if self.rest_dtype == "float16" else 32

    @property
    def name(self) -> str:
        """The methods' classes, for reports."""
        return " + ".join(dict.fromkeys(type(method).__name__ for method in self.methods))
