"""Puts files in their places whole or not at all.

Drafts lie in a folder of their own beside the target, so that no name that a user gives means anything to the writer. At every moment
there is the old file, the new one, or none if there was none. A process that is killed leaves the folder, ``.diffq_fx.<random>``, behind.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from diffq_fx.errors import DiffQError


@contextmanager
def naming(path: str | Path, error: type[DiffQError]) -> Iterator[None]:
    """Turn what the system says into ``error``, with the name that the user gave."""
    try:
        yield
    except Exception as problem:  # two kinds have no narrower common class, see below; all others are raised again
        of_safetensors = getattr(sys.modules.get("safetensors"), "SafetensorError", OSError)
        if not isinstance(problem, (OSError, ValueError, of_safetensors)) and type(problem) is not Exception:
            raise
        # a name with a null byte is a ValueError; a full disk is an error of safetensors' own, and a bare Exception to tokenizers
        raise error(f"cannot write {str(path)!r}: {getattr(problem, 'strerror', None) or problem}") from problem


def refuse_same_file(target: str | Path, sources: Iterable[str | Path], error: type[DiffQError]) -> None:
    """Refuse, by ``error``, to write over what is read: the target is one of the sources by whatever name, link or hard link."""
    for source in sources:
        with suppress(OSError, ValueError):  # one of them is missing, or can be no file: whoever opens it says so
            if os.path.samefile(source, target):
                raise error(f"'{target}' is the same file as '{source}', which would be lost. Give another name.")


@contextmanager
def draft_folder(path: Path, error: type[DiffQError]) -> Iterator[Path]:
    """A folder for drafts beside the target (of a link what it leads to), gone at the end whatever happens.

    Raises:
        DiffQError: as ``error``: the target's folder is missing or read-only, or the target is a folder, a device, a pipe or read-only.
    """
    with naming(path, error):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise error(f"cannot write '{path}': it is a folder; add the name of a file")
        if target.exists() and not target.is_file():
            raise error(f"cannot write '{path}': it is no regular file (a device, pipe or socket), which a new file would replace")
        if target.exists() and not os.access(target, os.W_OK):
            raise error(f"cannot write '{path}': the file is read-only")
    with _drafts_beside(target, path, error) as folder:
        yield folder


@contextmanager
def _drafts_beside(target: Path, path: Path, error: type[DiffQError]) -> Iterator[Path]:
    with naming(path, error):
        if not target.parent.exists():
            raise error(f"cannot write '{path}': No such file or directory; make its folder first")
        folder = Path(tempfile.mkdtemp(prefix=".diffq_fx.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(path: Path, error: type[DiffQError]) -> Iterator[Path]:
    """A draft of a folder that takes its place at the end with all that is in it; after an error, or an interrupt, there is none.

    Raises:
        DiffQError: as ``error``: there is a file or a folder that holds something, or its own folder is missing or read-only.
    """
    with naming(path, error):
        if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
            raise error(f"'{path}' is there already. Give the name of a new folder, or remove it")
        target = Path(os.path.realpath(path))
    with _drafts_beside(target, path, error) as drafts:
        draft = drafts / "draft"
        draft.mkdir()
        yield draft
        with naming(path, error):
            if target.exists():
                target.rmdir()
            os.replace(draft, target)


def put_in_place(draft: Path, path: Path) -> None:
    """Give a draft the name of a target on its file system, and the permissions of the file that it takes the place of.

    Raises:
        OSError: the target cannot be replaced; it is as it was.
    """
    target = Path(os.path.realpath(path))
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    if target.exists():
        os.chmod(draft, target.stat().st_mode & 0o7777)
    os.replace(draft, target)
    with suppress(OSError):  # makes the new name last through a power cut, on systems where a folder can be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def replaced_atomically(path: Path, error: type[DiffQError]) -> Iterator[BinaryIO]:
    """Open a draft that takes the place of ``path`` at the end, or goes away after an error.

    Raises:
        DiffQError: as ``error``: as for :func:`draft_folder`, or the disk is full.
    """
    with draft_folder(path, error) as folder, naming(path, error):
        draft = folder / "draft"
        with draft.open("xb") as file:
            yield file
        put_in_place(draft, path)
