"""Peers that train: diffq, torchao, Brevitas. Each is imported where it runs, so that one environment needs not hold them all."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.frontier.job import Job, NotApplicableError, Point, System, float_mib
from diffq_fx import WeightSpec, prepare
from diffq_fx.functional.groups import from_rows, to_rows
from diffq_fx.methods import STE

_AIMED_PENALTY = 30.0
"""Times the task's penalty, on what is above the budget."""
_AO_GROUP = 32


def _diffq(job: Job, loss_of_size: Callable[[Tensor], Tensor], setting: str) -> Point:
    """diffq with its defaults but for groups of 8, nearly no weight left in float, and the rate of its bits."""
    import diffq

    model = job.copy_of_float().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue] diffq takes no other
    quantizers: list[diffq.DiffQuantizer] = []

    def set_up(optimizer: torch.optim.Optimizer) -> None:  # diffq wants an optimizer from before its own parameters
        quantizers.append(diffq.DiffQuantizer(model, group_size=8, min_size=0.001))
        quantizers[0].setup_optimizer(optimizer, lr=job.bits_rate)

    training = job.training(model, set_up=set_up, extra=lambda: loss_of_size(quantizers[0].model_size()))
    training.advance(job.steps)
    model.eval()
    found = job.task.evaluate(model)
    return {"mib": float(quantizers[0].true_model_size()), "setting": f"group_size=8, {setting}, bits lr={job.bits_rate:g}", **found}


def _diffq_penalty(job: Job) -> Point:
    penalty = job.chosen_penalty
    return _diffq(job, lambda mib: penalty * mib, f"penalty={penalty:g}")


def _diffq_aimed(job: Job) -> Point:
    budget, weight = job.budget_mib, _AIMED_PENALTY * job.chosen_penalty
    return _diffq(job, lambda mib: weight * F.relu(mib - budget), f"penalty={weight:g} on what is above {budget:.4g} MiB")


def _torchao(job: Job) -> Point:
    """torchao's int4 weight-only QAT in groups of 32 on Linear and Embedding; it has nothing for convolutions and LSTMs."""
    if job.task.has_convolutions:
        raise NotApplicableError("torchao's QAT takes Linear and Embedding alone, and this task's weights are mostly others")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig

    model = job.copy_of_float()

    def takes(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % _AO_GROUP == 0

    config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=_AO_GROUP), step="prepare")
    quantize_(model, config, filter_fn=takes)
    taken = [module.weight.numel() for module in model.modules() if isinstance(module, FakeQuantizedLinear | FakeQuantizedEmbedding)]
    if not taken:
        raise NotApplicableError(f"torchao found no weight that its groups of {_AO_GROUP} divide")
    job.training(model).advance(job.steps)
    saved_bits = sum(taken) * (32 - 4 - 32 / _AO_GROUP)  # a level of 4 bits and its share of a float32 scale in place of 32 bits
    found = job.task.evaluate(model)
    return {"mib": float_mib(model) - saved_bits / 8 / 2**20, "setting": f"int4, symmetric, groups of {_AO_GROUP}", **found}


class _BrevitasModel(nn.Module):
    """A model that reads each weight through Brevitas' weight quantizer for layers, one scale per output channel.

    The quantizer is that of a ``brevitas.nn.QuantLinear`` over the weight's rows, so that LSTMs and transposed convolutions, for which
    Brevitas has no fast layers, are quantized like the rest.
    """

    def __init__(self, model: nn.Module, specs: list[WeightSpec], bits: int, *, learned: bool) -> None:
        super().__init__()
        import brevitas.nn as qnn
        from brevitas.inject.enum import BitWidthImplType, ScalingImplType
        from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE

        class Learned(Int8WeightPerChannelFloat):
            bit_width_impl_type = BitWidthImplType.PARAMETER
            scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
            bit_width = bits

        class Fixed(Int8WeightPerChannelFloatMSE):
            scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
            narrow_range = False
            bit_width = bits

        self.model, self.specs = model, specs
        self.layers = nn.ModuleList()
        for spec in specs:
            weight = model.get_parameter(spec.name)
            rows = to_rows(weight.detach(), spec.axis).clone()
            layer = qnn.QuantLinear(rows.shape[1], rows.shape[0], bias=False, weight_quant=Learned if learned else Fixed)
            layer.weight = nn.Parameter(rows)
            self.layers.append(layer)
            weight.requires_grad_(False)  # its place is taken by the rows
        with torch.no_grad():
            self.weights()  # sets the scales from the weights

    def weights(self) -> dict[str, Tensor]:
        """Name -> quantized weight."""
        pairs = zip(self.specs, self.layers, strict=True)
        return {spec.name: from_rows(layer.quant_weight().value, spec.shape, spec.axis).contiguous() for spec, layer in pairs}

    def forward(self, *inputs: Tensor) -> Tensor:
        """The model on its quantized weights."""
        return torch.func.functional_call(self.model, self.weights(), inputs)

    def mib(self) -> float:
        """Levels, a float32 scale per channel, a byte for the width of each weight, and the rest in float32."""
        quantized = {spec.name for spec in self.specs}
        bits = 32 * sum(parameter.numel() for name, parameter in self.model.named_parameters() if name not in quantized)
        for layer in self.layers:
            width = int(layer.quant_weight().bit_width)
            bits += layer.weight.numel() * width + layer.weight.shape[0] * 32 + 8
        return bits / 8 / 2**20


def _brevitas_model(job: Job, bits: int, *, learned: bool) -> _BrevitasModel:
    prepared = prepare(copy.deepcopy(job.task.float_model), job.task.example, STE(bits=8))  # the weights that our systems quantize
    specs = [quantizer.spec for quantizer in prepared.compression.quantizers]  # pyright: ignore
    return _BrevitasModel(job.copy_of_float(), specs, bits, learned=learned)


def _brevitas_fixed(job: Job) -> Point:
    model = _brevitas_model(job, job.whole_bits, learned=False)
    job.training(model).advance(job.steps)
    setting = f"Int8WeightPerChannelFloatMSE at {job.whole_bits} bits, scales learned"
    return {"setting": setting, **job.task.evaluate(model), "mib": model.mib()}


def _brevitas_learned(job: Job) -> Point:
    """A learned width for each weight tensor, from 6 bits, under Brevitas' own average of the widths weighted by size."""
    from brevitas.loss import WeightBitWidthWeightedBySize

    model = _brevitas_model(job, 6, learned=True)
    average = WeightBitWidthWeightedBySize(model)

    def set_up(optimizer: torch.optim.Optimizer) -> None:
        widths = [parameter for name, parameter in model.named_parameters() if name.endswith("bit_width_offset")]
        own = {id(parameter) for parameter in widths}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.add_param_group({"params": widths, "lr": job.bits_rate, "weight_decay": 0.0})

    def above_target() -> Tensor:
        excess = F.relu(average.retrieve() - job.bits)
        average.zero_accumulated_values()
        return excess

    job.training(model, set_up=set_up, extra=above_target).advance(job.steps)
    average.remove_hooks()
    setting = f"width per tensor, 1 x the average bits above {job.bits:g}, scales learned, bits lr={job.bits_rate:g}"
    return {"setting": setting, **job.task.evaluate(model), "mib": model.mib()}


PEERS: dict[str, System] = {
    "diffq": System(run=_diffq_penalty, packages=("diffq",), summary="diffq, groups of 8, a penalty on the size"),
    "diffq-aimed": System(run=_diffq_aimed, packages=("diffq",), summary="diffq, groups of 8, a penalty on what is above the budget"),
    "torchao-int4": System(run=_torchao, packages=("torchao",), summary="torchao QAT, int4 in groups of 32", bits=4),
    "brevitas-fixed": System(run=_brevitas_fixed, packages=("brevitas",), summary="Brevitas QAT, fixed width, learned scales"),
    "brevitas-learned": System(run=_brevitas_learned, packages=("brevitas",), summary="Brevitas QAT, learned width per tensor"),
}
