"""One process, or several that torchrun has started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """Which of how many this is, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """The part of each batch that is this process's."""
        return slice(self.rank, None, self.count)

    def wait(self) -> None:
        """Wait for all."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the others, if torchrun has started several: NCCL between GPUs, gloo between CPUs."""
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    if count > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(rank, count, where)
    finally:
        if count > 1:
            dist.destroy_process_group()
