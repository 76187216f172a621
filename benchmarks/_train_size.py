"""What the size, its gradient and the pressure on the bits take in a model of many small weights."""

import copy
import statistics

import torch
from torch import nn

from benchmarks._result import markdown_table
from benchmarks._train_systems import Step, interleaved
from diffq_fx import DiffQConfig, model_size, prepare_diffq

_WEIGHTS, _SIDE = 300, 64


def part_size(quick: bool) -> str:
    """Milliseconds of each, in turns."""
    import diffq

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(_SIDE, _SIDE) for _ in range(_WEIGHTS)))
    theirs = diffq.DiffQuantizer(copy.deepcopy(model), group_size=8, min_size=0)
    prepared = prepare_diffq(model, torch.zeros(1, _SIDE), DiffQConfig(target_bits=4, training_steps=10000))
    trained = list(prepared.parameters())
    alike = [nn.Parameter(parameter.detach().clone()) for parameter in trained]
    for parameter in (*trained, *alike):
        parameter.grad = torch.randn_like(parameter) / 100
    with_hooks, without = torch.optim.SGD(trained, lr=1e-6), torch.optim.SGD(alike, lr=1e-6)

    for _ in range(25):  # past the steps in which it is found out how sensitive the weights are
        with_hooks.step()
    steps: dict[str, Step] = {
        "optimizer's step of such parameters, nothing beside": without.step,
        "the same with a target: pressure before it, shift after it": with_hooks.step,
        "`model_size(model)`": lambda: model_size(prepared),
        "`model_size(model).backward()` with it": lambda: model_size(prepared).backward(),
        "diffq: `quantizer.model_size()`, groups of 8": theirs.model_size,
        "diffq: `quantizer.model_size().backward()` with it": lambda: theirs.model_size().backward(),
    }
    seconds = interleaved(steps, 20 if quick else 200, warm_up=5)
    rows = [[name, *(f"{1e3 * each:.2f}" for each in statistics.quantiles(times, n=4))] for name, times in seconds.items()]
    plain, held = (seconds[name] for name in list(steps)[:2])
    more = statistics.quantiles([1e3 * (b - a) for a, b in zip(plain, held, strict=True)], n=4)
    rows.append(["the target's part of the step: the second line less the first", *(f"{each:.2f}" for each in more)])
    header = (f"{_WEIGHTS} weights of {_SIDE} x {_SIDE}, a width for each channel", "first quartile, ms", "median", "third quartile")
    return markdown_table(header, rows)
