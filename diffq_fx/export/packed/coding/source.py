"""Bytes that are read one after the other, and never more than there are."""

from collections.abc import Callable

from diffq_fx.errors import PackedFileError

FEW = 1 << 16
"""Bytes that are read at once where nobody needs them together."""


class Source:
    """So many bytes of a file, taken from the front: what is taken and done with does not stay in memory."""

    def __init__(self, read: Callable[[int], bytes | memoryview], size: int) -> None:
        """Take them from ``read``, which gives exactly the next so many bytes."""
        self._read = read
        self._size = self.left = size

    @classmethod
    def of(cls, data: bytes | memoryview) -> "Source":
        """A source of bytes that are there.

        Example:
            >>> source = Source.of(b"abc")
            >>> bytes(source.take(2)), source.left
            (b'ab', 1)
        """
        view, at = memoryview(data), 0

        def read(count: int) -> memoryview:
            nonlocal at
            at += count
            return view[at - count : at]

        return cls(read, len(data))

    def take(self, count: int) -> bytes | memoryview:
        """The next ``count`` bytes.

        Raises:
            PackedFileError: there are fewer.
        """
        if count > self.left:
            raise PackedFileError(f"a block of {self._size} bytes ends early")
        self.left -= count
        return self._read(count)

    def part(self, size: int) -> "Source":
        """The next ``size`` bytes as a source of their own, to be read before this one goes on.

        Raises:
            PackedFileError: there are fewer.
        """
        if size > self.left:
            raise PackedFileError(f"a section of {size} bytes does not lie in the {self.left} that are left")
        return Source(self.take, size)

    def end_in_zeros(self) -> None:
        """Take what is left, and refuse anything but zeros.

        Raises:
            PackedFileError: there is something else.
        """
        while self.left:
            if any(self.take(min(self.left, FEW))):
                raise PackedFileError("something is hidden in the zeros that fill up a block")

    def end(self) -> None:
        """Refuse bytes that nobody took.

        Raises:
            PackedFileError: there are some.
        """
        if self.left:
            raise PackedFileError(f"a block of {self._size} bytes has {self.left} too many")
