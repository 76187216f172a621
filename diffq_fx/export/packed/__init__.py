"""Packed files: a converted model with its exact learned bits, at their entropy, safe to open. Importing this needs torch and numpy.

The schema is in ``docs/packed-format.md``, and how to add a kind of storage.

- To save (``saving``): collect what the model holds (``contents``), encode rows of weights as shards (``kinds``, ``shards``,
  ``shard_writing``, ``coding``), write the file (``fileformat``).
- To load (``loading``): open and validate (``fileformat``, ``reading``), decode shards (``shard_reading``), fill a model (``filling``).

``inspection`` looks into a file; ``state_dicts`` is for the command line.
"""

from diffq_fx.export.packed.loading import load_packed
from diffq_fx.export.packed.saving import save_packed

__all__ = ["load_packed", "save_packed"]
