"""This library without training: plain rounding, and ``compress``."""

from collections.abc import Callable

from torch import nn

from benchmarks.frontier.job import Job, Point, System
from benchmarks.frontier.post_training.matrices import Setting, measured, nearest, score
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
        config = DiffQConfig(target_bits=job.bits)
        with measured() as costs:
            chosen = config if embedding else {"*embed*": STE(bits=8), "*": config}
            converted = compress(job.task.float_model, job.task.unlabelled(), chosen, progress=False)
        return score(job, converted, _mib(converted), "; ".join(bits_report(converted).notes), costs)

    return run


OURS_POST_TRAINING: dict[str, System] = {
    name + suffix: System(run=make(embedding=not suffix), summary=f"{summary}{more}", trains=False, is_default=False)
    for name, make, summary in (
        ("rtn", _rtn, "STE untrained: round to nearest"),
        ("compress", _compress, "compress, DiffQConfig with target_bits"),
    )
    for suffix, more in (("", ""), ("-e8", "; embeddings at 8 bits, the rest at the budget"))
}
