"""What training with noise costs on a GPU: the kernels beside a copy of the same memory, and whole steps beside plain ones.

    python benchmarks/gpu.py                    # all of it; some minutes
    python benchmarks/gpu.py --device cpu --quick   # only to see that it runs

Torch's own operations run in turns with the kernels in Triton. Times are medians between two events of the device.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from _result import markdown_table, write_result
from torch import Tensor, nn

from diffq_fx import DiffQConfig, freeze_bits, prepare_diffq
from diffq_fx.kernels import gpu

BODIES = {"Triton": gpu.DEVICES, "torch": ()}
CONFIGS = {"per channel": {}, "in groups of 8": {"group_size": 8}}


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of single calls, the device's work included."""
    for _ in range(3):  # compiles, fills caches
        call()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def weights_table(device: torch.device, sizes: list[tuple[int, int]], rounds: int) -> str:
    """One weight: forward and backward of noise and of rounding, beside copying it twice."""
    rows = []
    for shape in sizes:
        source = torch.randn(shape, device=device)
        target, grad = torch.empty_like(source), torch.randn(shape, device=device)
        copied = 2 * milliseconds(partial(target.copy_, source), device, rounds)
        for name, settings in CONFIGS.items():
            layer, example = nn.Linear(shape[1], shape[0], bias=False, device=device), torch.zeros(1, shape[1], device=device)
            noisy = prepare_diffq(layer, example, DiffQConfig(target_bits=None, **settings)).train()
            final = copy.deepcopy(noisy)
            freeze_bits(final)
            for phase, model in (("noise", noisy), ("rounding", final)):
                (quantizer,) = model.compression.learned
                weight = quantizer.weight
                asked = [weight, quantizer.logits if phase == "noise" else quantizer.clip]

                def step(
                    quantizer: nn.Module = quantizer, weight: Tensor = weight, asked: list[Tensor] = asked, grad: Tensor = grad
                ) -> None:
                    torch.autograd.grad(quantizer(weight), asked, grad)

                times = []
                for devices in BODIES.values():
                    with mock.patch.object(gpu, "DEVICES", devices):
                        times.append(milliseconds(step, device, rounds))
                print(shape, name, phase, *times, flush=True)
                rows.append([f"{shape[0]} x {shape[1]}", name, phase, *(f"{each:.3f}" for each in (copied, *times))])
    return markdown_table(("weight", "bits", "phase", "two copies, ms", *(f"{body}, ms" for body in BODIES)), rows)


def steps_table(device: torch.device, quick: bool, rounds: int) -> str:
    """Whole training steps of a transformer over those of the plain model, compiled by inductor or not."""
    width, layers, tokens = (64, 2, 16) if quick else (1024, 12, 512)
    make = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(make, layers, enable_nested_tensor=False).to(device)
    x, rows = torch.randn(8, tokens, width, device=device), []
    models = {("plain", ""): plain}
    for name, config in CONFIGS.items():
        models[name, "noise"] = prepare_diffq(copy.deepcopy(plain), x[:1], DiffQConfig(target_bits=4, **config))
        models[name, "rounding"] = copy.deepcopy(models[name, "noise"])
        freeze_bits(models[name, "rounding"])
    for precision in (torch.float32, torch.bfloat16):
        for body, devices in BODIES.items():
            with mock.patch.object(gpu, "DEVICES", devices):
                rows += step_rows(models, x, precision, body, rounds)
    if not quick:
        rows += step_rows({key: models[key] for key in list(models)[:3]}, x, torch.bfloat16, "compiled", rounds)
    return markdown_table(("precision", "body", "bits", "phase", "step, ms", "over plain", "host, ms"), rows)


def step_rows(models: dict[tuple[str, str], nn.Module], x: Tensor, precision: torch.dtype, body: str, rounds: int) -> list[list[str]]:
    """Those of one precision, bfloat16 being autocast's, and one body of the kernels; host is the time until all is asked for."""
    rows, device = [], x.device
    for (name, phase), each in models.items():
        model = copy.deepcopy(each).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        run = torch.compile(model) if body == "compiled" else model

        def step(run: nn.Module = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
                loss = run(x).square().mean()
            loss.backward()
            optimizer.step()

        took, host = milliseconds(step, device, rounds), host_milliseconds(step, device, rounds)
        over = f"{took / float(rows[0][4]):.2f}" if rows else "1"
        rows.append([str(precision).removeprefix("torch."), body, name, phase, f"{took:.2f}", over, f"{host:.2f}"])
        print(*rows[-1], flush=True)
    return rows


def host_milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median time until a call returns, which begins with an idle device: what the device's work may hide."""
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    asked = parser.parse_args()
    device, rounds = torch.device(asked.device), 2 if asked.quick else 30
    sizes = [(64, 64)] if asked.quick else [(64, 576), (1024, 1024), (4096, 4096), (50_000, 768)]
    body = weights_table(device, sizes, rounds) + "\n\n" + steps_table(device, asked.quick, rounds)
    print(body)
    if not asked.quick:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(write_result("gpu", f"Training with noise on {card}", body, ("torch", "triton")))


if __name__ == "__main__":
    main()
