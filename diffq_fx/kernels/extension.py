"""The kernels in C, which are built when the package is installed where a C compiler is at hand.

Without them, or with ``DIFFQ_FX_KERNELS=torch`` in the environment, torch's own operations do the same, slower. The extension has a
variant for each kind of processor; the fastest that this one can run is taken, or the one that ``DIFFQ_FX_KERNELS`` names.
"""

import functools
import importlib
import logging
import os
from types import SimpleNamespace
from typing import Any

_log = logging.getLogger(__name__)


@functools.cache
def kernels() -> SimpleNamespace | None:
    """The kernels, a function each that takes addresses and numbers; None where torch's operations are to be used."""
    wanted, found = os.environ.get("DIFFQ_FX_KERNELS") or "native", variants()
    if wanted not in ("native", "torch", *found):
        here = ", ".join(f'"{name}"' for name in found) or "none is built"
        raise ValueError(
            f'DIFFQ_FX_KERNELS must be "native", "torch" or a variant of the kernels for this processor ({here}), got {wanted!r}.'
        )
    if wanted == "torch" or not found:
        return None
    return SimpleNamespace(**found[next(iter(found)) if wanted == "native" else wanted])


def loaded() -> Any:
    """The kernels, for work that needs them; their functions are of C and have no types that Python sees."""
    found = kernels()
    if found is None:
        raise RuntimeError("the kernels in C, which this work was begun with, are no longer there.")
    return found


def variants() -> dict[str, dict[str, Any]]:
    """The variants that this processor can run, the fastest first; none where the package was installed without the kernels."""
    try:
        return importlib.import_module("diffq_fx.kernels._kernels").variants
    except ImportError as error:  # not built, or the OpenMP library that it was built with is gone
        _log.info("torch's slower operations do the work of the kernels in C: %s", error)
        return {}
