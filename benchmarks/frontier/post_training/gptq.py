"""GPTQ (arXiv:2210.17323) by llmcompressor's function, layer after layer on what the rounded layers before give."""

import torch
from torch import Tensor, nn

from benchmarks.frontier.job import Job, NotApplicableError, Point
from benchmarks.frontier.post_training.matrices import (
    Setting,
    by_name,
    matrices,
    measured,
    mib_of,
    nearest,
    replace_matrices,
    score,
    size_of,
)

_SETTINGS = [Setting(4, 64, 20), Setting(3, 32, 19), Setting(2, 32, 18)]
_OBSERVER = "memoryless_mse"


class _EndError(Exception):
    """All weights are rounded: what follows, such as the logits of all tokens, needs not be computed."""


def _gptq(job: Job) -> Point:
    if job.task.has_convolutions:
        raise NotApplicableError("llmcompressor's GPTQ takes Linear alone here, and this task's weights are mostly others")
    setting, model = nearest(_SETTINGS, job.bits), job.copy_of_float()
    names = {id(parameter): name for name, parameter, is_embedding in matrices(model) if not is_embedding}
    waiting = set(names.values())

    def round_weight(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name = names.get(id(linear.weight))
        if name in waiting:
            linear.weight.copy_(_rounded(linear.weight, inputs[0].flatten(0, -2), setting))  # pyright: ignore
            waiting.remove(name)
        if not waiting:
            raise _EndError

    with measured() as costs, torch.no_grad():
        hooks = [module.register_forward_pre_hook(round_weight) for module in model.modules() if isinstance(module, nn.Linear)]
        try:
            model(*(torch.cat(each) for each in zip(*job.task.unlabelled(), strict=True)))
        except _EndError:
            pass
        for hook in hooks:
            hook.remove()
        if waiting:
            raise NotApplicableError(f"no Linear multiplies {', '.join(sorted(waiting))}")
        bits = replace_matrices(model, lambda _, rows: (rows, size_of(rows, setting)), embedding=False)
    return score(job, model, mib_of(model, bits), f"{setting}, {_OBSERVER}, static order of activations", costs)


def _rounded(weight: Tensor, inputs: Tensor, setting: Setting) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # pyright: ignore[reportMissingImports]
    from llmcompressor.observers import Observer  # pyright: ignore[reportMissingImports]

    asked = QuantizationArgs(
        num_bits=setting.bits,
        type="int",
        strategy="group",
        group_size=setting.group,
        symmetric=False,
        actorder="static",
        observer=_OBSERVER,
    )
    found = Observer.load_from_registry(_OBSERVER, base_name="weight", args=asked)(weight).get_qparams()
    scale, zero_point = found["scale"].half().float(), found["zero_point"]
    hessian = inputs.T @ inputs / len(inputs)
    return quantize_weight(weight[None].clone(), hessian[None], scale[None], zero_point[None], None, asked)[0][0]


GPTQ = {"gptq-e8": by_name(_gptq, ("llmcompressor",), "GPTQ by llmcompressor", embedding=False)}
