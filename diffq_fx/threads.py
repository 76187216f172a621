"""What the threads of a process share, and a trace changes: torch itself, and stderr."""

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

TRACING = threading.RLock()
"""Held by ``prepare``, ``export_onnx`` and ``compress``, which call each other: of two traces one would put back what the other set."""


class _OthersAlone(io.StringIO):
    """In the place of stderr: what other threads write goes on."""

    def __init__(self) -> None:
        super().__init__()
        self._here, self._stderr = threading.get_ident(), sys.stderr

    def write(self, text: str) -> int:
        """Write the text of other threads."""
        return len(text) if threading.get_ident() == self._here else self._stderr.write(text)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what this thread writes to stderr.

    Example:
        >>> with silent_stderr():
        ...     print("the graph of a trace that failed", file=sys.stderr)
    """
    with redirect_stderr(_OthersAlone()):
        yield
