"""What arguments of public functions and settings of methods may be: anything else is refused by name, with what was given."""

import os
from pathlib import Path
from typing import Any


def check_whole(caller: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number within its limits.

    Example:
        >>> check_whole("LC", "entries", 2.5, 1)
        Traceback (most recent call last):
        ...
        ValueError: LC: entries must be a whole number of at least 1, got 2.5.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{caller}: {name} must be a whole number {limits}, got {value!r}.")


def check_flags(caller: str, **flags: Any) -> None:
    """Refuse what is neither True nor False: any text is true, "no" too.

    Example:
        >>> check_flags("export_onnx", verify="no")
        Traceback (most recent call last):
        ...
        TypeError: export_onnx: verify must be True or False, got 'no'.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{caller}: {name} must be True or False, got {value!r}.")


def as_path(caller: str, name: str, value: Any) -> Path:
    """The path that was given; an error for what is none.

    Example:
        >>> as_path("save_packed", "path", None)
        Traceback (most recent call last):
        ...
        TypeError: save_packed: path must be a str or a Path, got NoneType.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{caller}: {name} must be a str or a Path, got {type(value).__name__}.")
    return Path(value)
