"""AutoRound: rounding and ranges of each block of a decoder tuned by signed gradients (arXiv:2309.05516)."""

from torch import Tensor, nn

from benchmarks.frontier.job import Job, NotApplicableError, Point
from benchmarks.frontier.post_training.matrices import Setting, by_name, measured, mib_of, nearest, replace_matrices, score
from benchmarks.frontier.tasks.language import Language

_SETTINGS = [Setting(4, 64, 20), Setting(3, 32, 19), Setting(2, 32, 18)]
_ITERATIONS, _BATCH = 50, 4


def _auto_round(job: Job) -> Point:
    if not isinstance(job.task, Language):
        raise NotApplicableError("AutoRound takes decoders of transformers")
    from auto_round import AutoRound

    setting, model = nearest(_SETTINGS, job.bits), job.copy_of_float()
    windows = [ids for (ids,) in job.task.unlabelled()]
    with measured() as costs:
        tuner = AutoRound(
            model.decoder,
            job.task.tokenizer,
            scheme={"bits": setting.bits, "group_size": setting.group, "sym": False, "data_type": "int", "act_bits": 16},
            dataset=windows,
            iters=_ITERATIONS,
            seqlen=job.task.window,
            nsamples=len(windows),
            batch_size=_BATCH,
            device_map="cpu",
            enable_torch_compile=False,
        )
        tuner.quantize()
    rounded = {f"{name}.weight": _values(module) for name, module in model.named_modules() if hasattr(module, "scale")}
    model = job.copy_of_float()
    bits = replace_matrices(model, lambda name, rows: (rounded[name], rows.numel() * setting.bits_a_weight), embedding=False)
    told = f"{setting}, {len(windows)} windows of {job.task.window} tokens, {_ITERATIONS} iterations of {_BATCH}"
    return score(job, model, mib_of(model, bits), told, costs)


def _values(linear: nn.Module) -> Tensor:
    """The levels times the float16 scales: AutoRound leaves their product in bfloat16."""
    blocks = linear.weight.detach().float().unflatten(1, (linear.scale.shape[1], -1))  # pyright: ignore
    scale, zero_point = linear.scale.float().unsqueeze(2), linear.zp.float().unsqueeze(2)  # pyright: ignore
    return (((blocks / scale + zero_point).round() - zero_point) * scale).flatten(1)


AUTO_ROUND = {"auto-round-e8": by_name(_auto_round, ("auto_round",), "AutoRound, asymmetric", embedding=False)}
