"""The errors and the one warning that diffq_fx raises.

A bad argument is a ``ValueError`` or ``TypeError``, as everywhere in Python; a model or a file that cannot be worked on is
a :class:`DiffQError`. Every message says which weight or node, what was expected against what was found, and what to do.
"""

import importlib.metadata
import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Text with its control characters spelled out: what a stranger's file calls its tensors must do nothing to a terminal.

    Example:
        >>> print(visible("weight\x1b[2J"))
        weight\x1b[2J
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says.

    Example:
        >>> first_line(ValueError("no")), first_line(KeyError())
        ('ValueError: no', 'KeyError')
    """
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


class DiffQError(Exception):
    """A model, graph or file that diffq_fx cannot work on."""

    def __str__(self) -> str:
        return visible(super().__str__())


class CaptureError(DiffQError):
    """The model could not be captured without changing its result or losing a weight's noise node."""


class PassError(DiffQError):
    """A graph pass was given, or produced, a graph that breaks its contract."""


class PreparationError(DiffQError):
    """The model cannot be prepared: nothing to quantize, already prepared, or unusable weights."""


class ConversionError(DiffQError):
    """The model cannot be converted: it was never prepared, or it is converted already."""


class ExportError(DiffQError):
    """A converted model cannot be exported, or its file does not compute what the model computes."""


class PackedFileError(DiffQError):
    """A packed file cannot be written or read: wrong contents, damage, another architecture, no space."""


class DivergenceError(DiffQError):
    """A training has diverged: a step that would use values that are not finite is not made, or is taken back."""


class DiffQWarning(UserWarning):
    """The call worked, but probably not the way it was meant."""


def missing(package: str, error: ImportError) -> ImportError:
    """What to raise where the package of an optional extra cannot be imported: names the extra, which is called as the package."""
    try:
        found = f"found {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    return ImportError(f"this part of diffq_fx needs the package {package} ({found}): pip install 'diffq-fx[{package}]'. {error}")


def why_too_old(package: str, needed: str) -> str:
    """In words that an installed package is older than what is needed; empty if it is not.

    Example:
        >>> why_too_old("numpy", "99.1")[:33], why_too_old("numpy", "1.0")
        ('needs numpy 99.1 or newer, found ', '')
    """
    found = importlib.metadata.version(package)
    numbers = [[int(part) for part in re.findall(r"\d+", version)[:2]] for version in (found, needed)]
    return f"needs {package} {needed} or newer, found {found}: pip install 'diffq-fx[{package}]'" if numbers[0] < numbers[1] else ""
