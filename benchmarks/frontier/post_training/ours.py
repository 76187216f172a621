"""This library without training: plain rounding, and ``compress``."""

from collections.abc import Callable

from torch import nn

from benchmarks.frontier.job import Job, Point, System
from benchmarks.frontier.ours import packed_mib
from benchmarks.frontier.post_training.matrices import Setting, eight_bits, matrices, measured, nearest, score
from diffq_fx import DiffQConfig, bits_report, compress, convert, prepare
from diffq_fx.methods import STE

_SETTINGS = [Setting(4, 128, 36), Setting(3, 64, 35), Setting(2, 64, 34)]


def _mib(converted: nn.Module) -> float:
    report = bits_report(converted)
    return (report.average_bits_in_all * report.numel + report.rest_bits) / 8 / 2**20


def _rtn(*, embedding: bool) -> Callable[[Job], Point]:
    def run(job: Job) -> Point:
        setting = nearest(_SETTINGS, job.bits)
        method = STE(bits=setting.bits, group_size=setting.group)
        with measured() as costs:
            model = prepare(job.copy_of_float(), job.task.example, method if embedding else {"*embed*": STE(bits=8), "*": method})
            converted = convert(model)
        return score(job, converted, _mib(converted), str(setting), costs)

    return run


def _compress(*, embedding: bool) -> Callable[[Job], Point]:
    def run(job: Job) -> Point:
        bits = job.bits if embedding else _bits_with_embedding(job)
        with measured() as costs:
            converted = compress(job.task.float_model, job.task.unlabelled(), DiffQConfig(target_bits=bits), progress=False)
        return score(job, converted, _mib(converted), "; ".join(bits_report(converted).notes), costs)

    return run


def _compress_packed(job: Job) -> Point:
    """The size is that of the packed file; no tuning."""
    config = DiffQConfig(target_bits=job.bits, size_of="packed_file")
    with measured() as costs:
        converted = compress(job.task.float_model, job.task.unlabelled(), config, steps=0, progress=False)
    return {**score(job, converted, _mib(converted), "; ".join(bits_report(converted).notes), costs), "packed_mib": packed_mib(converted)}


def _bits_with_embedding(job: Job) -> float:
    """Bits a weight of all matrices where embeddings take 8 bits and the others the budget."""
    total = numbers = 0.0
    for _, parameter, is_embedding in matrices(job.task.float_model):
        total += eight_bits(parameter) if is_embedding else job.bits * parameter.numel()
        numbers += parameter.numel()
    return total / numbers


_SUMMARIES = {
    "rtn": "STE untrained: round to nearest",
    "rtn-e8": "the same; embeddings at 8 bits, the rest at the budget",
    "compress": "compress with target_bits",
    "compress-e8": "the same, at the size that embeddings of 8 bits and the rest at the budget take; it spreads the bits itself",
}
_RUNS = {"rtn": _rtn, "compress": _compress}
OURS_POST_TRAINING: dict[str, System] = {
    name: System(run=_RUNS[name.removesuffix("-e8")](embedding=not name.endswith("-e8")), summary=summary, trains=False, is_default=False)
    for name, summary in _SUMMARIES.items()
} | {
    "compress-packed": System(
        run=_compress_packed, summary="compress to a size of the packed file, untuned", trains=False, is_default=False
    )
}
