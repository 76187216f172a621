"""One process, or several that torchrun has started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


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
def held(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a folder; the system lets go of it even when this process is killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as wrong:
        raise SystemExit(f"--out {folder} cannot be written: {wrong.strerror}. Give another.") from wrong
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as taken:
                raise SystemExit(f"--out {folder}: another process trains there. Wait for its end, or give another --out.") from taken
        yield


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the others, if torchrun has started several: NCCL between GPUs, gloo between CPUs."""
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here. Leave --device out to train on the CPU.")
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
