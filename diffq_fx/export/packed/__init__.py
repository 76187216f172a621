"""Packed files: a converted model with its exact learned bits, at their entropy, safe to open. Importing this needs torch and numpy.

The schema is in ``docs/packed-format.md``, and how to add a kind of storage. From the bytes up:

- a file with checksums: ``container``, ``dtypes``;
- integers as bytes: ``bitplanes``, ``deflate``, ``ans``, ``streams``, ``classes`` (what shares a stream), ``unpacking`` (in which order);
- kinds of storage: ``weight_kind``, ``integer_kind``, ``codebook_kind``; ``shards`` codes rows of any kind;
- the whole: ``header``, ``writer`` (save_packed), ``reader``, ``loading`` (load_packed), ``packed_report``, ``state_dicts`` (command line).
"""

from diffq_fx.export.packed.loading import load_packed
from diffq_fx.export.packed.writer import save_packed

__all__ = ["load_packed", "save_packed"]
