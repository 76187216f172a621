"""Peers that round one weight matrix at a time: their numbers go back into the float model, their size is counted bit by bit."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.frontier.job import Job, NotApplicableError, Point, System

_NEAR = 0.6
"""Bits a weight that a setting may be from the budget."""
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Rounded = tuple[Tensor, float]
"""Values in place of the weights, and the bits that they take."""


@dataclass(frozen=True)
class Setting:
    """A width and the number of weights that share a scale; ``overhead`` bits a group are its scale and zero point."""

    bits: int
    group: int
    overhead: int

    @property
    def bits_a_weight(self) -> float:
        """With scale and zero point."""
        return self.bits + self.overhead / self.group

    def __str__(self) -> str:
        return f"{self.bits} bits in blocks of {self.group}"


def nearest(settings: Sequence[Setting], budget: float) -> Setting:
    """The setting next to so many bits a weight."""
    found = min(settings, key=lambda each: abs(each.bits_a_weight - budget))
    if abs(found.bits_a_weight - budget) > _NEAR:
        raise NotApplicableError(f"its nearest setting, {found}, takes {found.bits_a_weight:.2f} bits a weight, {budget:g} are asked for")
    return found


def size_of(rows: Tensor, setting: Setting) -> float:
    """Levels of every weight and what each block of a row adds; a row's last block may be shorter."""
    return rows.numel() * setting.bits + len(rows) * -(-rows.shape[1] // setting.group) * setting.overhead


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Every weight of two dimensions or more, a shared one once, and whether an embedding holds it."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            yield name, parameter, id(parameter) in embeddings


def eight_bits(rows: Tensor) -> int:
    """What a matrix takes at 8 bits with a float32 scale a row."""
    return 8 * rows.numel() + 32 * len(rows)


def nearest_levels(rows: Tensor) -> Rounded:
    """The nearest of 255 levels a row: what embeddings have where a system leaves them to others."""
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round() * scale, eight_bits(rows)


def replace_matrices(model: nn.Module, round_rows: Callable[[str, Tensor], Rounded], *, embedding: bool) -> float:
    """Round all matrices in place; ``embedding`` False keeps embeddings at 8 bits. Returns the bits of all matrices."""
    total = 0.0
    with torch.no_grad():
        for name, parameter, is_embedding in matrices(model):
            rows = parameter.flatten(1)
            values, bits = nearest_levels(rows) if is_embedding and not embedding else round_rows(name, rows)
            parameter.copy_(values.view_as(parameter))
            total += bits
    return total


def mib_of(model: nn.Module, matrix_bits: float) -> float:
    """Size of the whole model; what is no matrix stays float32."""
    others = sum(parameter.numel() for parameter in model.parameters()) - _numbers(model)
    return (matrix_bits + 32 * others) / 8 / 2**20


def score(job: Job, model: nn.Module, mib: float, setting: str, costs: dict[str, float]) -> Point:
    """A point of a model that rounds already."""
    given = job.task.float_model
    bits_a_weight = (mib - mib_of(given, 0)) * 8 * 2**20 / _numbers(given)
    return {"mib": mib, "bits_a_weight": bits_a_weight, "setting": setting, **costs, **job.task.evaluate(model)}


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for _, parameter, _ in matrices(model))


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds and the growth of the process' memory at its peak, in MiB (on Linux), of what is compressed within."""
    found: dict[str, float] = {}
    before = _resident("VmRSS")
    if before is not None:
        _RESET.write_text("5")
    began = time.monotonic()
    yield found
    found["compress_seconds"] = round(time.monotonic() - began, 1)
    peak = _resident("VmHWM")
    if before is not None and peak is not None:
        found["peak_mib"] = round(peak - before)


def _resident(name: str) -> float | None:
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def by_name(run: Callable[[Job], Point], packages: tuple[str, ...], summary: str, *, embedding: bool) -> System:
    """A system that runs where it is named; ``embedding`` False says that it keeps embeddings at 8 bits."""
    beside = "" if embedding else "; embeddings at 8 bits, the rest at the budget"
    return System(run=run, packages=packages, summary=summary + beside, trains=False, is_default=False)
