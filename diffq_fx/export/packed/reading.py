"""An open packed file: its header checked, its tensors and shards read on demand, each against its checksum."""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from diffq_fx.errors import PackedFileError
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
        crc, found = 0, []
        for tensor in sorted(self.contents.tensors, key=lambda t: (t.start, t.stop)):
            data = self._container.read(tensor.start, tensor.stop)
            crc = zlib.crc32(data, crc)
            found.append((tensor, data))
        if crc != self.contents.tensors_crc32:
            raise PackedFileError("is damaged: the checksum of its plain tensors does not fit")
        return [(tensor, tensor_of(data, tensor.stored_dtype, tensor.shape).to(tensor.dtype)) for tensor, data in found]

    def shards_of(self, weights: Collection[int]) -> list[Shard]:
        """The shards that hold rows of these weights."""
        return [shard for shard in self.contents.shards if any(span.weight in weights for span in shard.spans)]

    def decode(self, shard: Shard) -> DecodedShard:
        """Read and decode a shard; may be called by several threads.

        Raises:
            PackedFileError: it is damaged.
        """
        data = self._container.read(shard.start, shard.stop)
        name = f"shard {self.contents.shards.index(shard)} (with '{self.contents.weights[shard.spans[0].weight].spec.name}')"
        if zlib.crc32(data) != shard.crc32:
            raise PackedFileError(f"is damaged: the checksum of {name} does not fit")
        try:
            return DecodedShard(memoryview(data), shard.spans, self.contents.weights, shard.head)
        except PackedFileError as error:
            raise PackedFileError(f"{name} cannot be decoded: {error}") from error


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
