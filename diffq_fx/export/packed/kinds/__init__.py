"""The kinds of stored weights that a packed file can hold: see :mod:`.base` for what a kind is. A new kind is one more line here."""

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.kinds.base import PackedWeight
from diffq_fx.export.packed.kinds.codebooks import PackedCodebook
from diffq_fx.export.packed.kinds.integers import PackedIntegers
from diffq_fx.storage import StoredWeight

KINDS: tuple[type[PackedWeight], ...] = (PackedIntegers, PackedCodebook)


def kind_of_stored(stored: StoredWeight) -> type[PackedWeight]:
    """The kind that packs a stored weight.

    Raises:
        PackedFileError: there is none.
    """
    for kind in KINDS:
        if isinstance(stored, kind.stored_type):
            return kind
    raise PackedFileError(f"a packed file cannot hold a {type(stored).__name__}")


def kind_of_name(name: object) -> type[PackedWeight]:
    """The kind of a name in a file.

    Raises:
        PackedFileError: this version does not know it.
    """
    for kind in KINDS:
        if kind.kind == name:
            return kind
    raise PackedFileError(f"its kind {name!r} is not known here; {' and '.join(kind.kind for kind in KINDS)} are")
