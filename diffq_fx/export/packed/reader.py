"""An open packed file: its header checked, its tensors and shards read on demand, each against its checksum."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.container import Container, Source
from diffq_fx.export.packed.dtypes import tensor_of
from diffq_fx.export.packed.header import Contents, PlainTensor, read_contents
from diffq_fx.export.packed.shards import DecodedShard, Shard
from diffq_fx.export.packed.streams import decode_bytes
from diffq_fx.file_kinds import foreign_kind

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def opened(path: str | Path) -> "Iterator[PackedReader]":
    """A packed file for reading; every error of this package that comes up meanwhile names the file."""
    try:
        if kind := foreign_kind(path):
            raise PackedFileError(f"{kind}; a packed file is wanted")
        try:
            file = Path(path).open("rb")
        except (OSError, ValueError) as error:  # a NUL in the name, or text that the system cannot encode
            raise PackedFileError(f"cannot be opened: {getattr(error, 'strerror', None) or 'no file can have this name'}") from error
        with file:
            yield PackedReader(file)
    except PackedFileError as error:
        raise PackedFileError(f"{str(path)!r}: {error}.") from error


class PackedReader(Container):
    """An open file with what its header says of tensors and shards, which it reads."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.contents: Contents = read_contents(self)

    def plain_tensors(self) -> list[tuple[PlainTensor, Tensor]]:
        """Every tensor that is stored as it is; an error if a checksum does not fit."""
        contents, found, small = self.contents, [], self._small_tensors()
        crc32 = 0
        for tensor in sorted(contents.tensors, key=lambda t: (t.start, t.stop)):
            if tensor.is_small:
                data = small[tensor.start : tensor.stop]
            else:
                data = self.read(tensor.start, tensor.stop)
                crc32 = zlib.crc32(data, crc32)
            found.append((tensor, data))
        if crc32 != contents.tensors_crc32:
            raise PackedFileError("is damaged: the checksum of its plain tensors does not fit")
        return [(tensor, tensor_of(data, tensor.stored_dtype, tensor.shape).to(tensor.dtype)) for tensor, data in found]

    def _small_tensors(self) -> bytes:
        """The bytes of all small tensors."""
        if (small := self.contents.small) is None:
            return b""
        with self._checked(small.start, small.stop, small.crc32, "its small tensors") as source:
            data = decode_bytes(source, small.coded_size, small.size)
            source.skip(zeros=True)
        return data

    def decode(self, shard: Shard) -> DecodedShard:
        """Read and decode a shard; may be called by several threads."""
        name = f"shard {self.contents.shards.index(shard)} (with '{self.contents.weights[shard.spans[0].weight].spec.name}')"
        with self._checked(shard.start, shard.stop, shard.crc32, name) as source:
            decoded = DecodedShard(source, shard, self.contents.weights)
        return decoded

    @contextmanager
    def _checked(self, start: int, stop: int, crc32: int, name: str) -> Iterator[Source]:
        """Some bytes of the file, decoded while they are read: nothing that they gave counts if their checksum does not fit in the end."""
        source, failure = Source(self.read, start, stop), None
        try:
            yield source
        except PackedFileError as error:
            failure = error
        source.skip()
        if source.crc32 != crc32:
            raise PackedFileError(f"is damaged: the checksum of {name} does not fit") from failure
        if failure is not None:
            raise PackedFileError(f"{name} cannot be decoded: {failure}") from failure


def in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Call a function with each item, in as many threads as torch uses; results come in order; after an error no more begin."""
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="diffq_fx") as pool:
        yield from pool.map(function, items)
