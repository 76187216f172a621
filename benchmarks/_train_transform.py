"""The noise alone over 8 M weights: our transform with the size beside diffq's, and the kernels that could make it."""

import copy
import statistics
import time
from collections.abc import Callable
from unittest import mock

import diffq
import torch
from torch import Tensor, nn

from benchmarks._noise_of_steps import add_noise
from benchmarks._result import markdown_table
from benchmarks._train_systems import Step, interleaved, ratio
from diffq_fx import DiffQConfig, model_size, prepare_diffq
from diffq_fx.kernels import extension

MILLIONS = 8 * 1024 * 1024 / 1e6


def weights_of(model: nn.Module) -> list[Tensor]:
    """The weights that the model computes with."""
    return [q(model.get_parameter(q.spec.name)) for q in model.compression.quantizers]


def part_transform(quick: bool) -> str:
    """Noise, size, and their backward, over 8 M weights in 8 tensors."""
    count, rows, columns = 8, 1024, 1024
    torch.manual_seed(0)
    float_model = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(count)))
    upstream = [torch.randn(rows, columns) for _ in range(count)]
    x = torch.zeros(1, columns)
    out = torch.empty(count * rows * columns)
    flat = torch.randn(count * rows * columns)
    words = torch.empty(count * rows * columns // 8, dtype=torch.int64)

    def floor() -> None:
        out.copy_(flat)
        words.random_(-(2**63), None)

    def ours(**settings: object) -> Step:
        model = prepare_diffq(copy.deepcopy(float_model), x, DiffQConfig(**settings)).train()

        parameters = list(model.parameters())

        def step() -> None:
            size = model_size(model)
            torch.autograd.grad([*weights_of(model), size], parameters, [*upstream, torch.ones(())])

        return step

    def theirs(group_size: int) -> Step:
        model = copy.deepcopy(float_model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        quantizer = diffq.DiffQuantizer(model, group_size=group_size, min_size=0.01)
        quantizer.setup_optimizer(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen: list[Tensor] = []
        for layer in model:
            layer.forward = lambda x, layer=layer: seen.append(layer.weight) or x

        def step() -> None:
            seen.clear()
            model.train()(x)
            torch.autograd.grad([*seen, quantizer.model_size()], parameters, [*upstream, torch.ones(())])

        return step

    steps = {
        "copy the weights once, draw one byte per weight": floor,
        "ours, per channel (default)": ours(),
        "ours, g=8": ours(group_size=8, target_bits=5),
        "ours, g=1": ours(group_size=1, target_bits=6),
        "diffq 0.2.4, g=8": theirs(8),
        "diffq 0.2.4, g=1": theirs(1),
    }
    seconds = interleaved(steps, 5 if quick else 25, warm_up=3)
    floor_times = seconds["copy the weights once, draw one byte per weight"]
    table = [
        [name, f"{1e3 * statistics.median(times) / MILLIONS:.2f}", ratio(times, floor_times), ratio(times, seconds["diffq 0.2.4, g=8"])]
        for name, times in seconds.items()
    ]
    header = ("8.4 M weights, forward and backward with the size", "ms per million weights", "over copy + draw", "over diffq g=8")
    return markdown_table(header, table)


def _written_out(weight: Tensor, step: Tensor) -> Tensor:
    """The noise as anyone would write it, for a compiler to fuse."""
    groups = weight.view(step.numel(), -1)
    return (groups + step.view(-1, 1) * (torch.rand_like(groups) - 0.5)).view(weight.shape)


def part_kernels(quick: bool) -> str:
    """The noise forward and the gradient of the step backward, by every way that was weighed."""
    return "\n\n".join(_kernels(name, groups, quick) for name, groups in (("per channel", 1), ("g=8", 128)))


def _kernels(name: str, groups: int, quick: bool) -> str:
    torch.manual_seed(0)
    weights = [torch.randn(1024, 1024, requires_grad=True) for _ in range(8)]
    steps = [torch.rand(1024, groups).add(0.1).requires_grad_() for _ in range(8)]
    upstream = [torch.randn(1024, 1024) for _ in range(8)]

    def over(noisy: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def step() -> None:
            torch.autograd.grad([noisy(w, s) for w, s in zip(weights, steps, strict=True)], [*weights, *steps], upstream)

        return step

    def ours(weight: Tensor, step: Tensor) -> Tensor:
        return add_noise(weight, step, axis=0, block=1024 // groups)

    def without_kernels() -> None:
        with mock.patch.object(extension, "kernels", return_value=None):
            over(ours)()

    torch._dynamo.reset()
    compiled = torch.compile(_written_out, fullgraph=True)
    begin = time.perf_counter()
    over(compiled)()
    compiling = time.perf_counter() - begin
    ways: dict[str, tuple[Step, float]] = {
        "C code, an extension of CPython": (over(ours), 0),
        "torch's operations, in tiles (no kernels built)": (without_kernels, 1),
        "torch.compile (Inductor), written out with rand_like": (over(compiled), _kept(compiled)),
        "torch's operations, written out with rand_like": (over(_written_out), _kept(_written_out)),
    }
    seconds = interleaved({way: step for way, (step, _) in ways.items()}, 5 if quick else 15, warm_up=3)
    first = seconds["C code, an extension of CPython"]
    rows = [[way, f"{1e3 * statistics.median(t) / MILLIONS:.2f}", ratio(t, first), f"{ways[way][1]:g}"] for way, t in seconds.items()]
    header = (f"8.4 M weights, {name}", "ms per million weights", "over the C code", "bytes kept per weight")
    return markdown_table(header, rows) + f"\n\nThe first call of Inductor took {compiling:.0f} s."


def _kept(noisy: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Bytes per weight that autograd holds between forward and backward, but the weight and the result."""
    weight, step = torch.randn(1024, 1024, requires_grad=True), torch.rand(1024, 1, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        noisy(weight, step)
    kept.pop(weight.data_ptr(), None)
    kept.pop(step.data_ptr(), None)
    return round(sum(kept.values()) / weight.numel(), 2)
