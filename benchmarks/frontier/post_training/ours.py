"""This library without training: plain rounding, and ``compress``."""

from collections.abc import Callable

from torch import nn

from benchmarks.frontier.job import Job, NotApplicableError, Point, System
from benchmarks.frontier.ours import packed_mib
from benchmarks.frontier.post_training.matrices import Setting, eight_bits, matrices, measured, nearest, nearest_levels, score, size_of
from benchmarks.frontier.tasks.language import Language
from diffq_fx import DiffQConfig, bits_report, compress, convert, prepare
from diffq_fx.methods import STE, Method
from diffq_fx.post_training.block_by_block import compress_blocks
from diffq_fx.post_training.samples import own_samples

_SETTINGS = [Setting(4, 128, 36), Setting(3, 64, 35), Setting(2, 64, 34)]
_TOO_LITTLE_FOR_MORE = 0.01
"""Bits a weight that a target of one width has beyond its size: no weight can have the next width."""


def _mib(converted: nn.Module) -> float:
    report = bits_report(converted)
    return (report.average_bits_in_all * report.numel + report.rest_bits) / 8 / 2**20


_MINUTES_WITHOUT_CHOICE = 5
"""Of ``compress`` with one width: half of its usual time goes to the choice of widths and to tuning."""


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


def _one_width(way: str, *, block: int | None, embedding: bool) -> Callable[[Job], Point]:
    """One width for all weights, or for all but embeddings, untrained and untuned: what is compared is ranges and rounding alone."""

    def run(job: Job) -> Point:
        bits, size, numbers = job.whole_bits, 0.0, 0
        for _, parameter, is_embedding in matrices(job.task.float_model):
            if embedding or not is_embedding:
                rows = parameter.flatten(1)
                size += size_of(rows, Setting(bits, block or rows.shape[1], 33 + bits))
                numbers += rows.numel()
        config = DiffQConfig(
            target_bits=size / numbers + _TOO_LITTLE_FOR_MORE,
            widths=(bits, 16),
            max_bits=16,
            group_size="tensor",
            range_per=block or "channel",
            clip_ranges=way != "span",
        )
        methods: DiffQConfig | dict[str, Method] = config if embedding else {"*embed*": STE(bits=8), "*": config}
        with measured() as costs:
            if way == "compress":
                converted = compress(
                    job.task.float_model, job.task.unlabelled(), methods, steps=0, minutes=_MINUTES_WITHOUT_CHOICE, progress=False
                )
            else:
                converted = convert(prepare(job.copy_of_float(), job.task.example, methods))
        return score(job, converted, _mib(converted), f"{bits} bits, ranges per {block or 'channel'}", costs)

    return run


def _compress_packed(job: Job) -> Point:
    """The size is that of the packed file; no tuning."""
    config = DiffQConfig(target_bits=job.bits, size_of="packed_file")
    with measured() as costs:
        converted = compress(job.task.float_model, job.task.unlabelled(), config, steps=0, progress=False)
    return {**score(job, converted, _mib(converted), "; ".join(bits_report(converted).notes), costs), "packed_mib": packed_mib(converted)}


def _own_samples(job: Job) -> Point:
    """No text: on 32 windows that the decoder writes itself."""
    decoder = _decoder(job)
    with measured() as costs:
        batches = [(each["input_ids"],) for each in own_samples(decoder)]
        converted = compress(job.task.float_model, batches, DiffQConfig(target_bits=_bits_with_embedding(job)), progress=False)
    return score(job, converted, _mib(converted), "; ".join(bits_report(converted).notes), costs)


def _blocks(job: Job) -> Point:
    """One decoder layer after another, without tuning; the embedding as peers have it."""
    _decoder(job)
    with measured() as costs:
        config = DiffQConfig(target_bits=job.bits)
        converted = compress_blocks(job.task.float_model, job.task.unlabelled(), "decoder.model.layers.*", config, steps=0, progress=False)
    table = next(parameter for _, parameter, is_embedding in matrices(converted) if is_embedding)
    values, bits = nearest_levels(table.detach())
    table.data.copy_(values)
    return score(job, converted, _mib(converted) - (32 * table.numel() - bits) / 8 / 2**20, "untuned", costs)


def _decoder(job: Job) -> nn.Module:
    if not isinstance(job.task, Language):
        raise NotApplicableError("only decoders write text or have layers one after another")
    return job.task.float_model.decoder  # pyright: ignore[reportReturnType]


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
    ),
    "compress-own-e8": System(run=_own_samples, summary="compress-e8 on text of the decoder's own", trains=False, is_default=False),
    "compress-blocks-e8": System(run=_blocks, summary="compress_blocks, each at the budget, untuned", trains=False, is_default=False),
}
for _way, _summary in {
    "untrained": "convert without training, one width",
    "untrained-span": "the same with clip_ranges=False",
    "untrained-compress": "compress without tuning, one width",
}.items():
    for _block in (None, 64):
        for _end in ("", "-e8"):
            _name = f"{_way}{'' if _block is None else f'-g{_block}'}{_end}"
            OURS_POST_TRAINING[_name] = System(
                run=_one_width(_way.removeprefix("untrained-"), block=_block, embedding=not _end),
                summary=f"{_summary}, ranges per {_block or 'channel'}",
                trains=False,
                is_default=False,
            )
