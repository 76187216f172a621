"""The systems of this library."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from torch import nn

from benchmarks.frontier.job import Job, Point, System, float_mib
from benchmarks.frontier.sessions import score_file
from diffq_fx import DiffQConfig, Distillation, ExportError, convert, model_size, prepare, reestimate_batch_norm, setup_optimizer
from diffq_fx.budget import sensitivity
from diffq_fx.export import export_onnx, save_packed
from diffq_fx.methods import LC, LSQ, STE, Method, QuantNoise
from diffq_fx.training.lc import LCLoop, LStep, geometric_schedule
from diffq_fx.training.output_loss import Kind

_L_STEPS = 20
_MU = (1e-2, 30.0)


def _settings(method: Method) -> str:
    """The config, without what it has by default."""
    plain = type(method)()
    differing = {name: value for name, value in vars(method).items() if value != getattr(plain, name) and name != "target_bits"}
    shown = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value!r}" for name, value in differing.items())
    return f"{type(method).__name__}({', '.join(shown)})"


def _finish(job: Job, model: nn.Module, setting: str) -> Point:
    """Convert and score, through ONNX too where that is asked for."""
    mib = float(model_size(model, exact=True))
    converted = convert(model).eval()
    allocation = converted.compression.allocation
    point: Point = {"mib": mib, "packed_mib": packed_mib(converted), "setting": setting, **job.task.evaluate(converted)}
    if allocation:
        point["allocation"] = allocation
    if job.through_onnx:
        point["onnx"] = through_onnx(job, converted)
    return point


def packed_mib(converted: nn.Module) -> float:
    """Size of the entropy-coded file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(converted, path)
        return path.stat().st_size / 2**20


def through_onnx(job: Job, converted: nn.Module) -> dict[str, float | str]:
    """Export a converted model and score the file on the whole test set, with activations in float and as it runs by default."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            result = export_onnx(converted, job.task.test_example, path)
        except ExportError as error:
            return {"refused": str(error).splitlines()[0]}
        exact, fast = (score_file(job.task, path, exact=exact)["score"] for exact in (True, False))
        return {"exact_score": exact, "fast_score": fast, "file_mib": result.file_bytes / 2**20}


def _trained(make: Callable[[Job], Method], *, batch_norm: bool = False, distilled: Kind | None = None) -> Callable[[Job], Point]:
    """Prepare, train, convert."""

    def run(job: Job) -> Point:
        method = make(job)
        model = prepare(job.copy_of_float(), job.task.example, method)
        job.training(model, distillation=Distillation(model, kind=distilled) if distilled else None).advance(job.steps)
        if batch_norm:
            batches = job.task.batches(job.seed + 1)
            reestimate_batch_norm(model, (inputs for (inputs, _), _ in zip(batches, range(10), strict=False)))
        return _finish(job, model, _settings(method))

    return run


def _uniform(job: Job) -> Point:
    """The bits stay where they start, which is the same for all groups: no gradient moves them, and they are not reallocated."""
    method = _aimed(job, training_steps=job.steps)
    model = prepare(job.copy_of_float(), job.task.example, method)
    for logits in model.compression.logits:
        logits.requires_grad_(False)
    with mock.patch.object(sensitivity, "bits_within", return_value=None):
        job.training(model).advance(job.steps)
    return _finish(job, model, f"{_settings(method)}, all groups with the same bits")


def _paper(job: Job) -> Point:
    """The paper preset, its bits at a rate of their own as there; weights are left in float from the size on that diffq is told, too."""
    method = replace(DiffQConfig.paper(penalty=job.chosen_penalty), min_size=262)
    model = prepare(job.copy_of_float(), job.task.example, method)
    rate = job.bits_rate / 10  # bits move ten times as fast as the paper's
    job.training(model, set_up=lambda optimizer: setup_optimizer(optimizer, model, bits_lr=rate)).advance(job.steps)
    return _finish(job, model, f"DiffQConfig.paper(penalty={job.chosen_penalty:g}), bits_lr={job.bits_rate:g}")


def _lc(job: Job, **codebook: object) -> Point:
    """Adaptive codebooks unless told otherwise; the steps are shared out over L steps of one optimizer."""
    method = LC(**codebook or {"entries": 2**job.whole_bits})  # pyright: ignore[reportArgumentType]
    model = prepare(job.copy_of_float(), job.task.example, method)
    turns = min(_L_STEPS, job.steps)
    penalty: list[LStep] = []
    training = job.training(model, extra=lambda: penalty[-1].penalty())
    ends = [round(job.steps * (turn + 1) / turns) for turn in range(turns)]

    def l_step(model: nn.Module, step: LStep) -> None:
        penalty.append(step)
        training.advance(ends[step.index] - training.done)

    factor = (_MU[1] / _MU[0]) ** (1 / max(turns - 1, 1))
    history = LCLoop(model, l_step, schedule=geometric_schedule(_MU[0], factor, turns), tolerance=0).run()
    setting = f"{_settings(method)}, {turns} L steps, mu {_MU[0]:g} to {_MU[1]:g}, distance {history[-1].distance:.1e}"
    return _finish(job, model, setting)


def _float(job: Job) -> Point:
    model = job.task.float_model
    return {"mib": float_mib(model), "setting": "as it was given", **job.task.evaluate(model)}


def _float_trained(job: Job) -> Point:
    model = job.copy_of_float()
    job.training(model).advance(job.steps)
    return {"mib": float_mib(model), "setting": "as many steps as the others", **job.task.evaluate(model)}


def _aimed(job: Job, **settings: object) -> DiffQConfig:
    return DiffQConfig(target_mib=job.budget_mib, **settings)  # pyright: ignore[reportArgumentType]


OURS: dict[str, System] = {
    "float": System(run=_float, summary="the float model", bits=32, trains=False),
    "float-trained": System(run=_float_trained, summary="the float model after as many steps as the others", bits=32),
    "ours": System(run=_trained(lambda job: _aimed(job, training_steps=job.steps)), summary="DiffQConfig with target_mib"),
    "ours-widths": System(
        run=_trained(lambda job: DiffQConfig(target_mib=job.budget_mib, training_steps=job.steps, widths=(2, 4, 8))),
        summary="the same with the widths of ONNX containers, 2, 4 and 8",
    ),
    "ours-paper": System(run=_paper, summary="DiffQConfig.paper with a penalty"),
    "ste": System(run=_trained(lambda job: STE(bits=job.whole_bits)), summary="uniform QAT, straight through"),
    "lsq": System(run=_trained(lambda job: LSQ(bits=job.whole_bits)), summary="learned step size"),
    "quant-noise": System(run=_trained(lambda job: QuantNoise(bits=job.whole_bits, rate=0.5)), summary="Quant-Noise, half of the weights"),
    "lc": System(run=_lc, summary="learning-compression, adaptive codebook"),
    "lc-binary": System(
        run=partial(_lc, codebook="scaled_binary"), summary="learning-compression, one scale a weight and its signs", is_default=False
    ),
    "lc-ternary": System(
        run=partial(_lc, codebook="scaled_ternary"), summary="learning-compression, one scale a weight and -1, 0 or 1", is_default=False
    ),
    "ours-uniform": System(run=_uniform, summary="ours, all groups with the same bits", is_default=False),
    "ours-noise": System(run=_trained(lambda job: _aimed(job, training_steps=10**6)), summary="ours, noise to the end", is_default=False),
    "ours-noise-bn": System(
        run=_trained(lambda job: _aimed(job, training_steps=10**6), batch_norm=True),
        summary="ours, noise to the end, batch norm estimated again",
        is_default=False,
    ),
    "ours-affine": System(
        run=_trained(lambda job: _aimed(job, training_steps=job.steps, grid="affine")),
        summary="ours, whole zero points alone",
        is_default=False,
    ),
    "ours-minmax": System(
        run=_trained(lambda job: _aimed(job, training_steps=job.steps, clip_ranges=False)),
        summary="ours, ranges that span all weights",
        is_default=False,
    ),
    "ours-noise-fifth": System(
        run=_trained(lambda job: _aimed(job, training_steps=2 * job.steps)),
        summary="ours, noise in a fifth of the steps",
        is_default=False,
    ),
    "ours-distilled": System(
        run=_trained(lambda job: _aimed(job, training_steps=job.steps), distilled="auto"),
        summary="ours, distilled from the float model",
        is_default=False,
    ),
    "ours-distilled-features": System(
        run=_trained(lambda job: _aimed(job, training_steps=job.steps), distilled="features"),
        summary="ours, distilled from the float model by the squared error of its outputs",
        is_default=False,
    ),
    "lsq-distilled": System(
        run=_trained(lambda job: LSQ(bits=job.whole_bits), distilled="auto"),
        summary="learned step size, distilled from the float model",
        is_default=False,
    ),
    "ours-entropy": System(
        run=_trained(lambda job: _aimed(job, training_steps=job.steps, size_of="packed_file")),
        summary="ours, the budget held by the entropy-coded size",
        is_default=False,
    ),
}
