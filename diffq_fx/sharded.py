"""Tensors that FSDP2 (``fully_shard``) divides between ranks, as the whole that bits and ranges are worked out from.

The result is the same on every rank, which keeps its own part. To gather is a collective operation: all ranks must do it, in one order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor
from torch.nn import Parameter

from diffq_fx.errors import DiffQError

_PLAIN = {Tensor, Parameter}


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of a tensor: a DTensor, told by what it has, since most models need no distributed package."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All values of a tensor, gathered from all ranks if it is sharded; differentiable."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def wholes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`whole` of each; of hundreds of plain tensors without a call for each."""
    return list(tensors) if _PLAIN.issuperset(map(type, tensors)) else [whole(tensor) for tensor in tensors]


def refuse_flat(name: str) -> NoReturn:
    """Say that FSDP1 has put a weight or its bits into a flat parameter, of which single values have no place of their own."""
    raise DiffQError(
        f"weight {name!r} is a part of a flat parameter of FullyShardedDataParallel, which keeps no bits of single weights: "
        "use fully_shard (FSDP2), on prepared layers or on the whole prepared model."
    )


def own_part(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, in its own memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@contextmanager
def gathered(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give the whole of each tensor, to be changed in place: in the end each rank keeps its part. Others are given as they are."""
    if _PLAIN.issuperset(map(type, tensors)):
        yield list(tensors)
        return
    given = [whole(tensor.detach()) if is_sharded(tensor) else tensor for tensor in tensors]
    yield given
    for tensor, values in zip(tensors, given, strict=True):
        if is_sharded(tensor):
            _keep_part(tensor, values)


def _keep_part(sharded: Any, values: Tensor) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded.detach().copy_(everywhere.redistribute(placements=sharded.placements))
