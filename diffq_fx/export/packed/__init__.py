"""Packed files: a converted model with its exact learned bits, at their entropy, safe to open. Importing this needs torch and numpy.

The schema is in ``docs/packed-format.md``. From the bottom up: ``bitplanes`` and ``rans`` code values, ``streams`` chooses between them,
``classes`` says which codes share a model, ``kinds`` and ``integers`` know the stored weights, ``shards`` puts rows of weights together,
``container`` and ``header`` are the file, ``saving``, ``loading`` and ``inspection`` the public functions.
"""

from diffq_fx.export.packed.loading import load_packed
from diffq_fx.export.packed.saving import save_packed

__all__ = ["load_packed", "save_packed"]
