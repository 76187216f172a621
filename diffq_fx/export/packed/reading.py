"""An open packed file: its header checked, its tensors and shards read on demand, each against its checksum."""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.coding.source import FEW, Source
from diffq_fx.export.packed.coding.streams import decode_bytes
from diffq_fx.export.packed.fileformat.container import Container
from diffq_fx.export.packed.fileformat.dtypes import tensor_of
from diffq_fx.export.packed.fileformat.header import PlainTensor, Shard, contents_from_json
from diffq_fx.export.packed.shard_reading import DecodedShard

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class PackedReader:
    """A packed file open for reading; a context manager. Its errors do not name the file: whoever opens it does."""

    def __init__(self, path: Path) -> None:
        """Open a file, check its header and read its codebooks.

        Raises:
            PackedFileError: it is not a packed file of this version, or its header or a codebook is damaged.
        """
        self._container = Container(path)
        try:
            self.contents = contents_from_json(self._container.contents, self._container.entries)
            self._read_commons()
        except BaseException:
            self._container.__exit__()
            raise

    def __enter__(self) -> "PackedReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.__exit__()

    def _read_commons(self) -> None:
        for common in self.contents.commons:
            data, weight = self._container.read(common.start, common.stop), self.contents.weights[common.weight]
            if zlib.crc32(data) != common.crc32:
                raise PackedFileError(f"is damaged: the checksum of the codebook of '{weight.spec.name}' does not fit")
            weight.set_common(tensor_of(data, common.dtype, common.shape))

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self._container.size

    def plain_tensors(self) -> list[tuple[PlainTensor, Tensor]]:
        """Every tensor that is stored as it is.

        Raises:
            PackedFileError: the checksum does not fit.
        """
        crc, found, small = 0, [], self._small_tensors()
        for tensor in sorted(self.contents.tensors, key=lambda t: (t.start, t.stop)):
            if tensor.is_small:
                data = small[tensor.start : tensor.stop]
            else:
                data = self._container.read(tensor.start, tensor.stop)
                crc = zlib.crc32(data, crc)
            found.append((tensor, data))
        if crc != self.contents.tensors_crc32:
            raise PackedFileError("is damaged: the checksum of its plain tensors does not fit")
        return [(tensor, tensor_of(data, tensor.stored_dtype, tensor.shape).to(tensor.dtype)) for tensor, data in found]

    def _small_tensors(self) -> bytes:
        """The bytes of all small tensors."""
        small = self.contents.small
        if small is None:
            return b""
        with self._checked(small.start, small.stop, small.crc32, "its small tensors") as source:
            data = decode_bytes(source.part(small.coded_size), small.size)
            source.end_in_zeros()
        return data

    def shards_of(self, weights: Collection[int]) -> list[Shard]:
        """The shards that hold rows of these weights."""
        return [shard for shard in self.contents.shards if any(span.weight in weights for span in shard.spans)]

    def decode(self, shard: Shard) -> DecodedShard:
        """Read and decode a shard; may be called by several threads.

        Raises:
            PackedFileError: it is damaged.
        """
        name = f"shard {self.contents.shards.index(shard)} (with '{self.contents.weights[shard.spans[0].weight].spec.name}')"
        with self._checked(shard.start, shard.stop, shard.crc32, name) as source:
            decoded = DecodedShard(source, shard.spans, self.contents.weights, shard.head)
        return decoded

    @contextmanager
    def _checked(self, start: int, stop: int, crc32: int, name: str) -> Iterator[Source]:
        """Some bytes of the file, decoded while they are read: at the end they must fit their checksum, or nothing that they gave counts.

        Raises:
            PackedFileError: they do not, or could not be decoded.
        """
        at, crc, failure = start, 0, None

        def read(count: int) -> bytes:
            nonlocal at, crc
            data = self._container.read(at, at + count)
            at, crc = at + count, zlib.crc32(data, crc)
            return data

        source = Source(read, stop - start)
        try:
            yield source
        except PackedFileError as error:
            failure = error
        while source.left:
            source.take(min(source.left, FEW))
        if crc != crc32:
            raise PackedFileError(f"is damaged: the checksum of {name} does not fit") from failure
        if failure is not None:
            raise PackedFileError(f"{name} cannot be decoded: {failure}") from failure


def in_threads(function: Callable[[_Item], _Result], shards: Sequence[_Item]) -> Iterator[_Result]:
    """Call a function with each shard, in as many threads as torch uses; results come in order.

    The first error ends it: what has not begun is not begun.
    """
    threads = min(torch.get_num_threads(), len(shards))
    if threads <= 1:
        yield from map(function, shards)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="diffq_fx") as pool:
        futures = [pool.submit(function, shard) for shard in shards]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
