"""The systems whose training steps are compared, the tasks they run on, and how two of them are timed in turns."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks._models import language_model, minilm_size
from diffq_fx import DiffQConfig, Distillation, prepare_diffq, recompute_weights
from diffq_fx.methods import diffq_settings
from recipes.models.cifar import ResNet18

Step = Callable[[], None]
Loss = Callable[[Tensor], Tensor]


def interleaved(steps: dict[str, Step], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every step in every round, all steps in turns; the order turns round by round."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + warm_up):
        for name in names if number % 2 else reversed(names):
            begin = time.perf_counter()
            steps[name]()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def quartiles(ours: list[float], base: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of the pairwise ratios."""
    q1, median, q3 = statistics.quantiles([a / b for a, b in zip(ours, base, strict=True)], n=4)
    return q1, median, q3


def ratio(ours: list[float], base: list[float]) -> str:
    """Median and middle half of the pairwise ratios."""
    q1, median, q3 = quartiles(ours, base)
    return f"{median:.3f} [{q1:.3f}, {q3:.3f}]"


def training_step(model: nn.Module, inputs: Tensor, loss_of: Loss, penalty: Callable[[], Tensor] | None = None) -> Step:
    """An ordinary step with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return _step(model, inputs, loss_of, optimizer, penalty)


def _step(
    model: nn.Module,
    inputs: Tensor,
    loss_of: Loss,
    optimizer: torch.optim.Optimizer,
    penalty: Callable[[], Tensor] | None,
) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of(model(inputs))
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()

    model.train()
    return step


def diffq_step(model: nn.Module, inputs: Tensor, loss_of: Loss, group_size: int) -> Step:
    """diffq as its README has it: two optimizers, the size in the loss."""
    import diffq

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    quantizer = diffq.DiffQuantizer(model, group_size=group_size, min_size=0.01)
    quantizer.setup_optimizer(optimizer)
    return _step(model, inputs, loss_of, optimizer, lambda: 1e-3 * quantizer.model_size())


def torchao_qat(model: nn.Module) -> nn.Module:
    """torchao's int4 weight-only QAT, groups of 32; it prepares Linear layers alone."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    quantize_(model, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare"))
    return model


def brevitas_qat(model: nn.Module) -> nn.Module:
    """Brevitas' Linear and Conv2d with 4-bit weights in place of torch's."""
    import brevitas.nn as qnn

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            made = qnn.QuantLinear(module.in_features, module.out_features, module.bias is not None, weight_bit_width=4)
        elif isinstance(module, nn.Conv2d):
            geometry = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
            made = qnn.QuantConv2d(module.in_channels, module.out_channels, *geometry, bias=module.bias is not None, weight_bit_width=4)
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)
    return model


def ours(**settings: object) -> Callable[[nn.Module, Tensor, Loss], Step]:
    """A step of a model that is prepared with these settings."""
    return lambda model, inputs, loss_of: training_step(prepare_diffq(model, inputs[:1], DiffQConfig(**settings)), inputs, loss_of)


def distilled(model: nn.Module, inputs: Tensor, _: Loss) -> Step:
    """A step of a model that follows the float model and no loss beside."""
    prepared = prepare_diffq(model, inputs[:1], DiffQConfig(training_steps=10))
    distill = Distillation(prepared)
    return training_step(prepared, inputs, lambda outputs: distill(inputs, outputs))


def recomputing(make: Callable[[nn.Module, Tensor, Loss], Step]) -> Callable[[nn.Module, Tensor, Loss], Step]:
    """The same steps with the weights made again in the backward."""

    def made(model: nn.Module, inputs: Tensor, loss_of: Loss) -> Step:
        step = make(model, inputs, loss_of)

        def within() -> None:
            with recompute_weights():
                step()

        return within

    return made


diffq_settings.SENSITIVITY_STEPS = 1  # the look at the gradients of the first steps is over after the warm-up
SYSTEMS: dict[str, Callable[[nn.Module, Tensor, Loss], Step]] = {
    "ours, per channel (default), noise": ours(),
    "ours, per channel (default), rounding": ours(training_steps=10),  # the noise is over after the warm-up
    "ours, per channel (default), rounding, Distillation": distilled,
    "ours, per channel, noise, recompute_weights()": recomputing(ours()),
    "ours, per channel, rounding, recompute_weights()": recomputing(ours(training_steps=10)),
    "ours, g=8, noise": ours(group_size=8, target_bits=5),
    "ours, g=1, noise": ours(group_size=1, target_bits=6),
    "diffq 0.2.4, g=8": lambda model, inputs, loss_of: diffq_step(model, inputs, loss_of, 8),
    "diffq 0.2.4, g=1": lambda model, inputs, loss_of: diffq_step(model, inputs, loss_of, 1),
    "torchao QAT int4 (Linear alone)": lambda model, inputs, loss_of: training_step(torchao_qat(model), inputs, loss_of),
    "Brevitas 4 bits (Linear, Conv2d)": lambda model, inputs, loss_of: training_step(brevitas_qat(model), inputs, loss_of),
}
"""Every system beside the plain step, in the order of the table."""


def pair(make: Callable[[], nn.Module], inputs: Tensor, loss_of: Loss, system: str) -> dict[str, Step]:
    """The plain step and that of one system on the same model."""
    torch.manual_seed(0)
    model = make()
    return {"plain": training_step(copy.deepcopy(model), inputs, loss_of), system: SYSTEMS[system](model, inputs, loss_of)}


def tasks(quick: bool = False) -> dict[str, tuple[Callable[[], nn.Module], Tensor, Loss, int]]:
    """Name -> model, inputs, loss, rounds."""
    generator = torch.Generator().manual_seed(0)

    def image(n: int) -> Tensor:
        return torch.randn(n, 3, 32, 32, generator=generator)

    def ids(n: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (n, 128), generator=generator)

    def square(output: Tensor) -> Tensor:
        return output.square().mean()

    small, large = (5, 3) if quick else (25, 13)
    return {
        "ResNet-18, batch 32": (ResNet18, image(32), square, small),
        "ResNet-18, batch 128": (ResNet18, image(128), square, large),
        "6-layer LM, 8 x 128": (language_model, ids(8, 4000), square, small),
        "6-layer LM, 64 x 128": (language_model, ids(64, 4000), square, large),
        "MiniLM size, 16 x 128": (minilm_size, ids(16, 30522), square, small),
    }
