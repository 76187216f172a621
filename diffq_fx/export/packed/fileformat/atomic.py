"""Puts a file in its place whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from diffq_fx.errors import PackedFileError


@contextmanager
def replaced_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its place at the end, or goes away after an error.

    At every moment there is the old file, the new one, or none if there was none, whatever happens to this process or the machine.
    A process that is killed leaves the temporary file, ``.<name>.<random>.tmp``, behind.

    Args:
        path: the file to write; a link is followed.

    Raises:
        PackedFileError: the folder is missing or read-only, the file is a folder or read-only, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise PackedFileError(f"cannot write '{path}': it is a folder")
    if target.exists() and not os.access(target, os.W_OK):
        raise PackedFileError(f"cannot write '{path}': the file is read-only")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(draft, target.stat().st_mode & 0o7777)
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PackedFileError(f"cannot write '{path}': {error.strerror or error}") from error
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, on systems where a folder can be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
