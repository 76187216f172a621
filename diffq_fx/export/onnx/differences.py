"""How far two tensors are apart: the largest difference, never a cosine."""

import math

import numpy as np


def largest_difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest ``|found - expected|``, and as a part of the largest finite ``|expected|``.

    Both are inf where only one of the two is NaN or infinite, or where the values are not numbers and differ.

    Args:
        found: any shape.
        expected: the same shape.

    Example:
        >>> largest_difference(np.array([1.0, -2.5]), np.array([1.0, -2.0]))
        (0.5, 0.25)
    """
    if not found.size:
        return 0.0, 0.0
    if expected.dtype.kind not in "fiub":
        far = math.inf if (found != expected).any() else 0.0
        return far, far
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(found - expected))
    difference = float(np.where(np.isnan(distance), np.inf, distance).max())
    largest = float(np.max(np.abs(expected), where=np.isfinite(expected), initial=0.0))
    return difference, difference / largest if largest else math.inf if difference else 0.0
