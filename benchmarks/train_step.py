"""What training with noise costs: whole steps, the transform alone, and memory, interleaved with the peers.

    python benchmarks/train_step.py --part transform     # the noise, forward and backward, over the weights alone
    python benchmarks/train_step.py --part step          # whole training steps
    python benchmarks/train_step.py --part growth        # prepare, one transform, convert from 1 M to 300 M weights

All systems of a table run in turns in one process; a cell is the median of the pairwise ratios to the plain step and, in brackets, the
middle half of them.
"""

import argparse
import copy
import resource
import statistics
import time
import warnings
from collections.abc import Callable

import diffq
import torch
from _models import ResNet18, language_model, minilm_size
from _result import markdown_table, write_result
from torch import Tensor, nn

from diffq_fx import DiffQConfig, convert_diffq, model_size, prepare_diffq

Step = Callable[[], None]


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


def ratio(ours: list[float], base: list[float]) -> str:
    """Median and middle half of the pairwise ratios."""
    q1, median, q3 = statistics.quantiles([a / b for a, b in zip(ours, base, strict=True)], n=4)
    return f"{median:.3f} [{q1:.3f}, {q3:.3f}]"


def training_step(
    model: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor], penalty: Callable[[], Tensor] | None = None
) -> Step:
    """An ordinary step with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return _step(model, inputs, loss_of, optimizer, penalty)


def _step(
    model: nn.Module,
    inputs: Tensor,
    loss_of: Callable[[Tensor], Tensor],
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


def diffq_step(model: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor], group_size: int) -> Step:
    """diffq as its README has it: two optimizers, the size in the loss."""
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


def systems(make: Callable[[], nn.Module], inputs: Tensor, loss_of: Callable[[Tensor], Tensor], wanted: str) -> dict[str, Step]:
    """The same model under every system whose name has ``wanted`` in it, and plain."""
    float_model = make()

    def ours(**settings: object) -> Step:
        return training_step(prepare_diffq(copy.deepcopy(float_model), inputs[:1], DiffQConfig(**settings)), inputs, loss_of)

    makers: dict[str, Callable[[], Step]] = {
        "plain": lambda: training_step(copy.deepcopy(float_model), inputs, loss_of),
        "ours, per channel (default)": ours,
        "ours, g=8": lambda: ours(group_size=8, target_bits=5),
        "ours, g=1": lambda: ours(group_size=1, target_bits=6),
        "diffq 0.2.4, g=8": lambda: diffq_step(copy.deepcopy(float_model), inputs, loss_of, 8),
        "diffq 0.2.4, g=1": lambda: diffq_step(copy.deepcopy(float_model), inputs, loss_of, 1),
        "torchao QAT int4 (Linear alone)": lambda: training_step(torchao_qat(copy.deepcopy(float_model)), inputs, loss_of),
        "Brevitas 4 bits (Linear, Conv2d)": lambda: training_step(brevitas_qat(copy.deepcopy(float_model)), inputs, loss_of),
    }
    return {name: make() for name, make in makers.items() if wanted in name or name == "plain"}


def tasks(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor], int]]:
    """Name -> model, inputs, loss, rounds."""
    generator = torch.Generator().manual_seed(0)

    def image(n: int) -> Tensor:
        return torch.randn(n, 3, 32, 32, generator=generator)

    def ids(n: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (n, 128), generator=generator)

    def square(output: Tensor) -> Tensor:
        return output.square().mean()

    small, large = (3, 2) if quick else (9, 5)
    return {
        "ResNet-18, batch 32": (ResNet18, image(32), square, small),
        "ResNet-18, batch 128": (ResNet18, image(128), square, large),
        "6-layer LM, 8 x 128": (language_model, ids(8, 4000), square, small),
        "6-layer LM, 64 x 128": (language_model, ids(64, 4000), square, large),
        "MiniLM size, 16 x 128": (minilm_size, ids(16, 30522), square, small),
    }


def part_step(quick: bool, wanted: str = "", task: str = "") -> str:
    """Whole steps."""
    columns: dict[str, dict[str, str]] = {}
    for name, (make, inputs, loss_of, rounds) in tasks(quick).items():
        if task not in name:
            continue
        torch.manual_seed(0)
        steps = systems(make, inputs, loss_of, wanted)
        seconds = interleaved(steps, rounds)
        columns[name] = {system: ratio(times, seconds["plain"]) for system, times in seconds.items()}
        columns[name]["plain"] = f"1 ({statistics.median(seconds['plain']):.2f} s)"
        print(name, columns[name], flush=True)
        del steps
    rows = [[system, *(columns[task][system] for task in columns)] for system in next(iter(columns.values()))]
    return "Step time over the plain step.\n\n" + markdown_table(["", *columns], rows)


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
        [name, f"{1e3 * statistics.median(times) / 8.39:.2f}", ratio(times, floor_times), ratio(times, seconds["diffq 0.2.4, g=8"])]
        for name, times in seconds.items()
    ]
    header = ("8.4 M weights, forward and backward with the size", "ms per million weights", "over copy + draw", "over diffq g=8")
    return markdown_table(header, table)


def part_growth(quick: bool) -> str:
    """Time and memory of prepare, one transform forward, and convert, in one process per size."""
    rows = []
    for millions in (1, 10, 100) if quick else (1, 10, 30, 100, 300):
        rows.append(_growth_row(millions))
        print(rows[-1], flush=True)
    header = (
        "million weights",
        "float MiB",
        "prepare s",
        "peak during prepare / float",
        "one transform s",
        "convert s",
        "peak during convert / float",
    )
    return markdown_table(header, rows)


def _growth_row(millions: int) -> list[str]:
    """One size in a child process, so that its peak memory is its own."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grow, (millions,))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _grow(millions: int) -> list[str]:
    side = 1000
    warnings.simplefilter("ignore")
    prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64))  # what is loaded once
    before = _peak_mib()
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(millions)))
    size = millions * side * side * 4 / 2**20
    begin = time.perf_counter()
    prepared = prepare_diffq(model, torch.zeros(1, side))
    prepare_seconds, prepare_peak = time.perf_counter() - begin, _peak_mib() - before
    begin = time.perf_counter()
    with torch.no_grad():
        for quantizer in prepared.train().compression.quantizers:
            quantizer(prepared.get_parameter(quantizer.spec.name))
    transform_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    convert_diffq(prepared)
    convert_seconds, convert_peak = time.perf_counter() - begin, _peak_mib() - before
    peaks = (prepare_peak / size, convert_peak / size)
    return [
        str(millions),
        f"{size:.0f}",
        f"{prepare_seconds:.2f}",
        f"{peaks[0]:.2f}",
        f"{transform_seconds:.2f}",
        f"{convert_seconds:.2f}",
        f"{peaks[1]:.2f}",
    ]


PARTS = {"transform": part_transform, "growth": part_growth}


def main() -> None:
    """Run one part and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["step", *PARTS], required=True)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--systems", default="", help="only those with this in their name; for --part step")
    parser.add_argument("--task", default="", help="only those with this in their name; for --part step")
    arguments = parser.parse_args()
    if arguments.part == "step":
        body = part_step(arguments.quick, arguments.systems, arguments.task)
    else:
        body = PARTS[arguments.part](arguments.quick)
    title = f"Training with noise: {arguments.part}"
    path = write_result(f"train_{arguments.part}", title, body, ["torch", "diffq", "torchao", "brevitas"])
    print(path.read_text())


if __name__ == "__main__":
    main()
