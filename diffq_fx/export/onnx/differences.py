"""How far the outputs of two runs are apart: the largest difference, never a cosine."""

import math
from dataclasses import dataclass

import numpy as np

from diffq_fx.errors import DiffQError


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """How far one output of B is from that of A."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    """Largest ``|A - B|``; inf where only one of them is NaN or infinite, or where they are not numbers and differ."""
    max_relative: float
    """``max_abs`` divided by the largest finite ``|A|`` of this output."""


def difference_of(name: str, a: np.ndarray, b: np.ndarray, sides: tuple[str, str] = ("A", "B")) -> OutputDifference:
    """Compare one output.

    Raises:
        DiffQError: The two have other shapes; ``sides`` says where they are from.

    Example:
        >>> difference = difference_of("y", np.array([1.0, -2.0]), np.array([1.0, -2.5]))
        >>> difference.max_abs, difference.max_relative
        (0.5, 0.25)
    """
    if a.shape != b.shape:
        raise DiffQError(f"output '{name}' has shape {list(a.shape)} in {sides[0]} and {list(b.shape)} in {sides[1]} on the same inputs")
    if a.dtype.kind not in "fiub":
        far = math.inf if (a != b).any() else 0.0
        return OutputDifference(name=name, shape=a.shape, max_abs=far, max_relative=far)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    largest = float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0))
    difference = float(np.max(np.where(np.isnan(distance), np.inf, distance), initial=0.0))
    relative = difference / largest if largest else math.inf if difference else 0.0
    return OutputDifference(name=name, shape=a.shape, max_abs=difference, max_relative=relative)
